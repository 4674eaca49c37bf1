"""The manifests: core kinds by published schemas, the RayService by one of the fields used."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Literal

import kubernetes_validate
import pytest
import yaml
from pydantic import BaseModel, ConfigDict, Field

from serve_app.cli.cluster.inventory import Inventory, load_inventory, parse_inventory
from serve_app.cli.cluster.render.kubernetes import render
from serve_app.cli.cluster.render_settings import RAY_VERSION
from serve_app.config.load import load_serve_file
from serve_app.core.errors import ConfigError

VERSION = "1.34"
CORE = ("namespace.yaml", "poddisruptionbudget.yaml", "networkpolicy.yaml")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class HeadGroup(_Strict):
    """KubeRay's HeadGroupSpec, as far as it is used."""

    rayStartParams: dict[str, str]
    template: dict[str, Any]


class WorkerGroup(HeadGroup):
    """KubeRay's WorkerGroupSpec, as far as it is used."""

    groupName: str = Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=63)
    replicas: int = Field(ge=0)
    minReplicas: int = Field(ge=0)
    maxReplicas: int = Field(ge=1)


class AuthOptions(_Strict):
    mode: Literal["token", "disabled"]


class RayCluster(_Strict):
    rayVersion: str = Field(pattern=r"^\d+\.\d+\.\d+$")
    authOptions: AuthOptions
    headGroupSpec: HeadGroup
    workerGroupSpecs: list[WorkerGroup] = Field(min_length=1)


class UpgradeStrategy(_Strict):
    type: Literal["NewCluster", "NewClusterWithIncrementalUpgrade", "None"]


class RayServiceSpec(_Strict):
    upgradeStrategy: UpgradeStrategy
    serveConfigV2: str
    rayClusterConfig: RayCluster


class RayService(_Strict):
    """KubeRay's RayService, ray.io/v1."""

    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayService"]
    metadata: dict[str, Any]
    spec: RayServiceSpec


@pytest.fixture(scope="module")
def inventory(repository: Path) -> Inventory:
    return load_inventory(repository / "cluster/inventory.yaml")


@pytest.fixture(scope="module")
def documents(inventory: Inventory) -> dict[str, Any]:
    return {name: yaml.safe_load(text) for name, text in render(inventory).items()}


@pytest.fixture(scope="module")
def service(documents: dict[str, Any]) -> RayService:
    return RayService.model_validate(documents["rayservice.yaml"])


def default_service() -> RayService:
    inventory = parse_inventory("machines: [{address: a, role: head}]", "test")
    return RayService.model_validate(yaml.safe_load(render(inventory)["rayservice.yaml"]))


def pods(service: RayService) -> list[dict[str, Any]]:
    cluster = service.spec.rayClusterConfig
    return [cluster.headGroupSpec.template, *(group.template for group in cluster.workerGroupSpecs)]


@pytest.mark.parametrize("name", CORE)
def test_core_kinds_fit_their_schemas(documents: dict[str, Any], name: str) -> None:
    kubernetes_validate.validate(documents[name], VERSION, strict=True)


def test_the_validator_would_notice(documents: dict[str, Any]) -> None:
    wrong = {**documents[CORE[1]], "spec": {"maxUnavailabel": 1}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, VERSION, strict=True)


def test_pod_templates_fit_the_schema_of_a_pod(service: RayService) -> None:
    for template in pods(service):
        pod = {"apiVersion": "v1", "kind": "Pod", **template}
        kubernetes_validate.validate(pod, VERSION, strict=True)


def test_by_default_a_pod_may_take_8_cores_and_64_gib() -> None:
    for template in pods(default_service()):
        (container,) = template["spec"]["containers"]
        assert container["resources"]["limits"] == {"cpu": "8", "memory": "64Gi"}
        assert container["resources"]["requests"] == container["resources"]["limits"]


def test_the_gpu_resource_follows_the_driver(service: RayService) -> None:
    groups = {group.groupName: group for group in service.spec.rayClusterConfig.workerGroupSpecs}
    for name, resource in (("battlemage", "gpu.intel.com/xe"), ("alchemist", "gpu.intel.com/i915")):
        (container,) = groups[name].template["spec"]["containers"]
        assert container["resources"]["limits"][resource] == 1
        assert '"arc_gpu": 1' in groups[name].rayStartParams["resources"]
        assert groups[name].rayStartParams["num-gpus"] == "0"
    assert "intel.com/gpu" not in str(service.model_dump()).replace("gpu.intel.com", "")


def test_cards_without_a_driver_are_refused() -> None:
    text = "machines: [{address: a, role: head}]\nkubernetes: {groups: [{name: g, cards: 1}]}"
    with pytest.raises(ConfigError, match=r"cards need driver: i915 or xe"):
        parse_inventory(text, "test")


def test_serve_config_is_valid_for_ray_and_for_us(service: RayService, tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text(service.spec.serveConfigV2)
    file = load_serve_file(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own, from pydantic, at its first import
        from ray.serve.schema import ServeDeploySchema

    assert ServeDeploySchema.model_validate(file.document).applications[0].name == "xeray"
    assert (file.host, file.proxy_location) == ("0.0.0.0", "EveryNode")


def test_every_config_can_be_deployed(repository: Path) -> None:
    for path in sorted((repository / "configs").glob("*.yaml")):
        text = (
            "machines: [{address: a, role: head}]\n"
            f"kubernetes: {{config: {path.stem}, groups: [{{name: g, cards: 1, driver: xe}}]}}"
        )
        document = yaml.safe_load(render(parse_inventory(text, "test"))["rayservice.yaml"])
        serve = yaml.safe_load(document["spec"]["serveConfigV2"])
        assert serve["http_options"]["host"] == "0.0.0.0"


def test_pods_are_guarded(service: RayService) -> None:
    assert service.spec.rayClusterConfig.authOptions.mode == "token"
    assert service.spec.rayClusterConfig.rayVersion == RAY_VERSION
    for template in pods(service):
        spec = template["spec"]
        (container,) = spec["containers"]
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "privileged": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        writable = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        volumes = {volume["name"] for volume in spec["volumes"] if "emptyDir" in volume}
        assert {"/tmp", "/var/lib/xeray", "/dev/shm"} <= set(writable)
        assert {writable[path] for path in ("/tmp", "/var/lib/xeray", "/dev/shm")} <= volumes
        assert {"livenessProbe", "readinessProbe"} <= set(container)
        names = {variable["name"] for variable in container["env"]}
        assert "RAY_custom_unit_instance_resources" in names
        assert not any(name.startswith("RAY_AUTH") for name in names)  # KubeRay's own Secret


def test_pods_may_have_our_seccomp_profile() -> None:
    text = (
        "machines: [{address: a, role: head}]\n"
        "kubernetes: {seccomp_profile: profiles/xeray-seccomp.json}"
    )
    document = yaml.safe_load(render(parse_inventory(text, "test"))["rayservice.yaml"])
    for template in pods(RayService.model_validate(document)):
        assert template["spec"]["securityContext"]["seccompProfile"] == {
            "type": "Localhost",
            "localhostProfile": "profiles/xeray-seccomp.json",
        }


def test_the_policies_select_the_pods(documents: dict[str, Any], service: RayService) -> None:
    head, *workers = [template["metadata"]["labels"] for template in pods(service)]
    budget = documents["poddisruptionbudget.yaml"]["spec"]["selector"]["matchLabels"].items()
    policy = documents["networkpolicy.yaml"]["spec"]["podSelector"]["matchLabels"].items()

    assert all(budget <= labels.items() for labels in workers)
    assert not budget <= head.items()
    assert all(policy <= labels.items() for labels in (head, *workers))


def test_the_api_alone_is_open_to_everyone(documents: dict[str, Any]) -> None:
    rules = documents["networkpolicy.yaml"]["spec"]["ingress"]
    open_rules = [rule for rule in rules if "from" not in rule]
    assert [rule["ports"] for rule in open_rules] == [[{"protocol": "TCP", "port": 8000}]]


def test_a_models_claim_is_mounted_read_only() -> None:
    text = (
        "machines: [{address: a, role: head}]\n"
        "kubernetes: {models_claim: models, model: /models/a.gguf}"
    )
    document = yaml.safe_load(render(parse_inventory(text, "test"))["rayservice.yaml"])
    for template in pods(RayService.model_validate(document)):
        kubernetes_validate.validate(
            {"apiVersion": "v1", "kind": "Pod", **template}, VERSION, strict=True
        )
        (container,) = template["spec"]["containers"]
        assert {"name": "XERAY_MODEL", "value": "/models/a.gguf"} in container["env"]
        assert {"name": "models", "mountPath": "/models", "readOnly": True} in container[
            "volumeMounts"
        ]
