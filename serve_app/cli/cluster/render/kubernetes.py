"""Kubernetes: a KubeRay RayService (KubeRay ≥ 1.6 for `authOptions` in it) and what guards it.

Each group of worker pods is a NodeSpec; what KubeRay does itself (start command, head address,
token) is left to it.
"""

from __future__ import annotations

import json
from typing import Any

import yaml

from serve_app.cli.cluster.inventory import Inventory
from serve_app.cli.cluster.node_spec import NODE_LABEL, NodeSpec
from serve_app.cli.cluster.render.templates import MADE_BY, to_yaml
from serve_app.cli.cluster.render_settings import RAY_VERSION, Kubernetes, PodGroup
from serve_app.config.load import load_serve_file
from serve_app.config.resources import find_config
from serve_app.deployments.cluster_resources import ARC_GPU, XEON_CORES

USER_ID = 10001
"""The image's user."""

API_PORT = 8000
_AGENT_PORT = 52365
_WRITABLE = {"shm": "/dev/shm", "tmp": "/tmp", "home": "/var/lib/xeray"}
"""Volumes of a container, whose own file system is read-only: objects, Ray's sockets and logs, and
compiled kernels."""
_LABELS = {"app.kubernetes.io/name": "xeray", "app.kubernetes.io/part-of": "xeray"}


def render(inventory: Inventory) -> dict[str, str]:
    """Return file name → text. Raises ConfigError where the config fits no cluster."""
    settings = inventory.kubernetes
    comment = MADE_BY.format(kind="kubernetes")
    documents = {
        "namespace.yaml": _namespace(settings),
        "rayservice.yaml": _ray_service(inventory),
        "poddisruptionbudget.yaml": _disruption_budget(settings),
        "networkpolicy.yaml": _network_policy(settings),
    }
    return {name: comment + to_yaml(document) for name, document in documents.items()}


def _metadata(settings: Kubernetes, name: str) -> dict[str, Any]:
    return {"name": name, "namespace": settings.namespace, "labels": dict(_LABELS)}


def _namespace(settings: Kubernetes) -> dict[str, Any]:
    labels = {**_LABELS, "pod-security.kubernetes.io/enforce": "restricted"}
    return {
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": {"name": settings.namespace, "labels": labels},
    }


def _ray_service(inventory: Inventory) -> dict[str, Any]:
    settings = inventory.kubernetes
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": _metadata(settings, inventory.cluster.name),
        "spec": {
            "upgradeStrategy": {"type": "NewCluster"},
            "serveConfigV2": serve_config(settings.config),
            "rayClusterConfig": {
                "rayVersion": RAY_VERSION,
                "authOptions": {"mode": "token"},
                "headGroupSpec": _head_group(inventory),
                "workerGroupSpecs": [_worker_group(inventory, group) for group in settings.groups],
            },
        },
    }


def serve_config(name: str) -> str:
    """Return a config of `configs/` for a cluster: every node with replicas answers HTTP.

    Raises ConfigError where there is no such config, or it is not valid.
    """
    path = find_config(name)
    load_serve_file(path)
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    document["proxy_location"] = "EveryNode"
    document["http_options"] = (document.get("http_options") or {}) | {
        "host": "0.0.0.0",
        "port": API_PORT,
    }
    return to_yaml(document)


def _spec(inventory: Inventory, name: str, group: PodGroup | None) -> NodeSpec:
    """Return the NodeSpec of a pod: like a machine's, but for the head's state and token."""
    return NodeSpec(
        name=name,
        cluster=inventory.cluster.name,
        role="head" if group is None else "worker",
        address=name,
        head=f"{inventory.cluster.name}:{inventory.cluster.port}",
        folder="/var/lib/xeray/node",
        resources={} if group is None else _ray_resources(group),
        num_cpus=0 if group is None else group.cpu,
        labels={} if group is None else _ray_labels(group),
        proxy=inventory.cluster.proxy,
        gcs_storage="memory",
        environment=inventory.cluster.environment,
    )


def _ray_resources(group: PodGroup) -> dict[str, int]:
    counts = {ARC_GPU: group.cards, XEON_CORES: group.xeon_cores}
    return {name: count for name, count in counts.items() if count}


def _ray_labels(group: PodGroup) -> dict[str, str]:
    driver = {} if group.driver is None else {"xeray/card-driver": group.driver}
    return {**driver, **group.labels}


def _ray_params(spec: NodeSpec) -> dict[str, str]:
    """Return rayStartParams: KubeRay writes them as `--key=value` into a shell's command."""
    pairs = {**spec.labels, NODE_LABEL: spec.name}
    params = {
        "num-cpus": str(spec.num_cpus),
        "num-gpus": "0",  # cards are arc_gpu; KubeRay would guess from the pod's limits
        "labels": "'" + ",".join(f"{key}={value}" for key, value in sorted(pairs.items())) + "'",
    }
    if spec.resources:
        params["resources"] = f"'{json.dumps(spec.resources)}'"
    if spec.role == "head":
        params["dashboard-host"] = "0.0.0.0"  # the operator deploys through it
    return params


def _environment(spec: NodeSpec, settings: Kubernetes) -> list[dict[str, str]]:
    """Return the NodeSpec's variables, less the token's, which KubeRay sets from its Secret."""
    variables = {k: v for k, v in spec.variables().items() if not k.startswith("RAY_AUTH_")}
    variables["XERAY_LOCK_DIR"] = "/tmp/xeray-locks"
    if settings.model is not None:
        variables["XERAY_MODEL"] = settings.model
    return [{"name": name, "value": value} for name, value in sorted(variables.items())]


def _head_group(inventory: Inventory) -> dict[str, Any]:
    settings = inventory.kubernetes
    spec = _spec(inventory, "head", None)
    container = _container("ray-head", settings.head_image, spec, settings)
    container["resources"] = _limits(settings.head_cpu, settings.head_memory)
    container["ports"] = [
        {"name": name, "containerPort": port}
        for name, port in (
            ("gcs-server", inventory.cluster.port),
            ("dashboard", 8265),
            ("client", 10001),
            ("serve", API_PORT),
        )
    ]
    container["readinessProbe"] = _raylet_probe(period_s=5, failures=6)
    return {"rayStartParams": _ray_params(spec), "template": _pod(container, settings)}


def _worker_group(inventory: Inventory, group: PodGroup) -> dict[str, Any]:
    settings = inventory.kubernetes
    spec = _spec(inventory, group.name, group)
    container = _container("ray-worker", group.image, spec, settings)
    container["resources"] = _limits(group.cpu, group.memory, _gpu_limits(group))
    container["ports"] = [{"name": "serve", "containerPort": API_PORT}]
    # Ready: this pod's proxy has its routes. A pod without replicas has none and gets no traffic.
    container["readinessProbe"] = _http_probe("/-/healthz", API_PORT, period_s=2, failures=2)
    return {
        "groupName": group.name,
        "replicas": group.replicas,
        "minReplicas": group.replicas,
        "maxReplicas": group.replicas,
        "rayStartParams": _ray_params(spec),
        "template": _pod(container, settings, group),
    }


def _gpu_limits(group: PodGroup) -> dict[str, int]:
    """Return the device plugin's resource: it is named after the kernel driver of the card.

    `intel.com/gpu` exists only where dynamic resource allocation (DRA) maps it.
    """
    return {f"gpu.intel.com/{group.driver}": group.cards} if group.cards else {}


def _limits(cpu: int, memory: str, extra: dict[str, int] | None = None) -> dict[str, Any]:
    amounts: dict[str, Any] = {"cpu": str(cpu), "memory": memory, **(extra or {})}
    return {"limits": amounts, "requests": dict(amounts)}


def _container(name: str, image: str, spec: NodeSpec, settings: Kubernetes) -> dict[str, Any]:
    mounts: list[dict[str, Any]] = [
        {"name": name, "mountPath": path} for name, path in _WRITABLE.items()
    ]
    if settings.models_claim is not None:
        mounts.append({"name": "models", "mountPath": "/models", "readOnly": True})
    return {
        "name": name,
        "image": image,
        "env": _environment(spec, settings),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "privileged": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": mounts,
        "livenessProbe": _raylet_probe(period_s=10, failures=6),
    }


def _pod(
    container: dict[str, Any], settings: Kubernetes, group: PodGroup | None = None
) -> dict[str, Any]:
    security: dict[str, Any] = {
        "runAsNonRoot": True,
        "runAsUser": USER_ID,
        "runAsGroup": USER_ID,
        "fsGroup": USER_ID,
        "seccompProfile": _seccomp(settings),
    }
    if group is not None and group.cards:
        security["supplementalGroups"] = [settings.render_gid]
    volumes: list[dict[str, Any]] = [
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "2Gi"}},
        {"name": "tmp", "emptyDir": {"sizeLimit": settings.tmp_size}},
        {"name": "home", "emptyDir": {"sizeLimit": settings.tmp_size}},
    ]
    if settings.models_claim is not None:
        claim = {"claimName": settings.models_claim, "readOnly": True}
        volumes.append({"name": "models", "persistentVolumeClaim": claim})
    spec: dict[str, Any] = {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": security,
        "terminationGracePeriodSeconds": settings.termination_grace_s,
        "containers": [container],
        "volumes": volumes,
    }
    if group is not None and group.node_selector:
        spec["nodeSelector"] = dict(group.node_selector)
    labels = {**_LABELS, "app.kubernetes.io/component": "worker" if group else "head"}
    return {"metadata": {"labels": labels}, "spec": spec}


def _seccomp(settings: Kubernetes) -> dict[str, str]:
    if settings.seccomp_profile is None:
        return {"type": "RuntimeDefault"}
    return {"type": "Localhost", "localhostProfile": settings.seccomp_profile}


def _http_probe(path: str, port: int, *, period_s: int, failures: int) -> dict[str, Any]:
    return {
        "httpGet": {"path": path, "port": port},
        "periodSeconds": period_s,
        "timeoutSeconds": 4,
        "failureThreshold": failures,
    }


def _raylet_probe(*, period_s: int, failures: int) -> dict[str, Any]:
    # Of the few paths that Ray answers without its token.
    probe = _http_probe(
        "/api/local_raylet_healthz", _AGENT_PORT, period_s=period_s, failures=failures
    )
    return {**probe, "initialDelaySeconds": 20}


def _disruption_budget(settings: Kubernetes) -> dict[str, Any]:
    selector = {"app.kubernetes.io/name": "xeray", "app.kubernetes.io/component": "worker"}
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": _metadata(settings, "xeray-workers"),
        "spec": {"maxUnavailable": 1, "selector": {"matchLabels": selector}},
    }


def _network_policy(settings: Kubernetes) -> dict[str, Any]:
    """Return who may talk to the pods: each other; clients to the API; the operator to Ray."""
    ours = {"podSelector": {"matchLabels": {"app.kubernetes.io/name": "xeray"}}}
    operator = {
        "namespaceSelector": {
            "matchLabels": {"kubernetes.io/metadata.name": settings.operator_namespace}
        }
    }
    dns = {
        "to": [
            {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kube-system"}}}
        ],
        "ports": [{"protocol": protocol, "port": 53} for protocol in ("UDP", "TCP")],
    }
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": _metadata(settings, "xeray"),
        "spec": {
            "podSelector": ours["podSelector"],
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [
                {"from": [ours]},
                {"ports": [{"protocol": "TCP", "port": API_PORT}]},
                {
                    "from": [operator],
                    "ports": [{"protocol": "TCP", "port": port} for port in (8265, _AGENT_PORT)],
                },
            ],
            # Nothing is fetched at run time; the API's fallback upstream would need a rule here.
            "egress": [{"to": [ours]}, dns],
        },
    }
