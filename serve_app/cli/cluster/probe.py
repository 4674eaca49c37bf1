"""`xeray cluster probe`: the facts of this machine that decide how its node is started."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from serve_app import __version__
from serve_app.deployments.cluster_resources import node_resources
from serve_app.deployments.haproxy_instance import find_haproxy
from serve_app.hardware.cards import Card, list_cards

NPU = "npu"
_NPU_DRIVER = "intel_vpu"
_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class CardFacts:
    """A GPU: `kind` is the Ray resource that it counts as, memory in bytes (0: unknown)."""

    kind: str
    name: str
    driver: str
    memory_bytes: int
    pci_address: str


@dataclass(frozen=True, slots=True)
class Facts:
    """What a machine runs and has; `labels` are those of its node."""

    hostname: str
    xeray: str
    python: str
    ray: str
    kernel: str
    num_cpus: int
    has_haproxy: bool
    resources: Mapping[str, int] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    cards: Sequence[CardFacts] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return the facts as plain values, for JSON."""
        return asdict(self)


def facts_from_dict(values: Mapping[str, Any]) -> Facts:
    """Return the facts of another machine. Raises TypeError where they are none."""
    cards = tuple(CardFacts(**card) for card in values.get("cards", ()))
    return Facts(**{**values, "cards": cards})


def probe(root: Path = Path("/"), env: Mapping[str, str] | None = None) -> Facts:
    """Read this machine's facts; imports neither Ray nor torch.

    root: folder under which `sys` lies. Raises ConfigError on a variable that is no count.
    """
    found = list_cards(root, env)
    resources = {name: int(count) for name, count in node_resources(root, env).items()}
    if num_npus := count_npus(root):
        resources[NPU] = num_npus
    cards = tuple(
        CardFacts(
            "igpu" if card.is_integrated else "arc_gpu",
            card.name,
            card.driver,
            card.memory_bytes,
            card.pci_address,
        )
        for card in (*found.discrete, *found.integrated)
    )
    return Facts(
        hostname=platform.node(),
        xeray=__version__,
        python=platform.python_version(),
        ray=metadata.version("ray"),
        kernel=platform.release(),
        num_cpus=len(os.sched_getaffinity(0)),
        has_haproxy=find_haproxy() is not None,
        resources=resources,
        labels=node_labels(found.discrete or found.integrated),
        cards=cards,
    )


def count_npus(root: Path = Path("/")) -> int:
    """Return how many Intel NPUs have their driver bound."""
    devices = (root / "sys/class/accel").glob("accel*/device")
    return sum(_driver(device) == _NPU_DRIVER for device in devices)


def node_labels(cards: Sequence[Card]) -> dict[str, str]:
    """Return model, memory and driver of a node's cards as labels, for `label_selector`.

    Of several unlike cards the models are joined by `.`; the memory is that of the smallest, in
    whole GiB: what fits it fits each.
    """
    if not cards:
        return {}
    labels = {
        "xeray/card-model": _label(dict.fromkeys(card.name for card in cards)),
        "xeray/card-driver": _label(dict.fromkeys(card.driver for card in cards)),
    }
    if smallest := min(card.memory_bytes for card in cards):
        labels["xeray/card-memory-gib"] = str(round(smallest / _GIB))
    return labels


def mismatches(facts: Facts, reference: Facts) -> list[str]:
    """Return how the versions of `facts` differ from `reference`, the head's: a phrase each.

    Ray asks for its own exact version everywhere, and for Python's first two numbers.
    """
    pairs = (
        ("Python", _minor(facts.python), _minor(reference.python)),
        ("Ray", facts.ray, reference.ray),
        ("XeRay", facts.xeray, reference.xeray),
    )
    return [f"{name} {here}, the head has {there}" for name, here, there in pairs if here != there]


def missing(wanted: Mapping[str, int], facts: Facts) -> list[str]:
    """Return which cards of the inventory a machine lacks: a phrase each."""
    return [
        f"{count} {name} in the inventory, {facts.resources.get(name, 0)} on the machine"
        for name, count in wanted.items()
        if count > facts.resources.get(name, 0)
    ]


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _label(names: Mapping[str, None]) -> str:
    words = [re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") for name in names]
    return ".".join(words)[:63].strip("-.")


def _driver(device: Path) -> str:
    link = device / "driver"
    return link.resolve().name if link.exists() else ""
