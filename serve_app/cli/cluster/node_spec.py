"""What one node is started with: the single source of bring-up, units, images and manifests."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from serve_app.deployments.environment import serve_environment

NODE_LABEL = "xeray/node"
"""Label with the machine's name in the inventory."""

FOLDER_VARIABLE = "XERAY_NODE_FOLDER"
"""In the environment of every process of a node, the means to find those that outlived it."""

GCS_RECONNECT_S = 120
"""How long a raylet waits for a head that restarts before it gives up; Ray's own is 60."""


HERE = "this-host"
"""A name and address that the host itself fills in: for commands that are the same on all hosts."""


class NodeSpec(BaseModel):
    """One node of a cluster.

    `resources` None: counted on the machine; without `xeon_cores`, those are. `head` is host:port
    of the control service. `folder` is on the node and may begin with `~`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    cluster: str
    role: Literal["head", "worker"]
    address: str
    head: str
    folder: str
    resources: dict[str, int] | None = None
    num_cpus: int | None = None
    labels: dict[str, str] = {}
    proxy: Literal["haproxy", "python"] = "haproxy"
    gcs_storage: Literal["rocksdb", "memory"] = "rocksdb"
    start_timeout_s: float = 90.0
    environment: dict[str, str] = {}
    ray_args: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        """The node's folder."""
        return Path(self.folder).expanduser()

    @property
    def token_path(self) -> Path:
        """The file with Ray's authentication token, mode 600."""
        return self.path / "auth_token"

    def variables(self) -> dict[str, str]:
        """Return the environment of the node's Ray, and of commands that talk to it."""
        variables = serve_environment(self.proxy)
        variables |= {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token_path),
            "RAY_gcs_rpc_server_reconnect_timeout_s": str(GCS_RECONNECT_S),
        }
        if self.role == "head" and self.gcs_storage == "rocksdb":
            variables |= {
                "RAY_gcs_storage": "rocksdb",
                "RAY_gcs_storage_path": str(self.path / "gcs"),
            }
        return variables | self.environment

    def ray_start(
        self, resources: Mapping[str, int], labels: Mapping[str, str], *, block: bool = True
    ) -> list[str]:
        """Return the arguments of `ray` that start the node with `resources` and `labels`."""
        port = self.head.rpartition(":")[2]
        where = (
            ["--head", f"--port={port}", "--dashboard-host=127.0.0.1"]
            if self.role == "head"
            else [f"--address={self.head}"]
        )
        arguments = ["start", *where, f"--node-ip-address={self.address}"]
        if self.num_cpus is not None:
            arguments.append(f"--num-cpus={self.num_cpus}")
        if resources:
            arguments.append(f"--resources={json.dumps(dict(sorted(resources.items())))}")
        pairs = {**labels, **self.labels, NODE_LABEL: self.name}
        arguments.append("--labels=" + ",".join(f"{k}={v}" for k, v in sorted(pairs.items())))
        arguments += ["--disable-usage-stats", *self.ray_args]
        return [*arguments, "--block"] if block else arguments
