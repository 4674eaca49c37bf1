"""Intel GPUs of this host, from sysfs: discrete or integrated, real or simulated.

A discrete card's `index` is its place among the discrete cards in PCI order: the number that Ray's
resource `arc_gpu` counts and that the card's lock is named after. `level_zero_index` is its place
among all Intel GPUs in PCI order: what ZE_AFFINITY_MASK means with ZE_ENABLE_PCI_ID_DEVICE_ORDER=1.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from serve_app.config.env import SIMULATED_ARC_CARDS, SIMULATED_IGPUS, read_count
from serve_app.hardware.sysfs import read_text

_INTEL = "0x8086"
_DISPLAY_CLASSES = ("0x0300", "0x0380")  # VGA controller, other display controller
_CARD_DIR = re.compile(r"card\d+$")  # not its connectors, card0-DP-1
_MIB = 1 << 20
_GIB = 1 << 30

_KNOWN_CARDS: dict[str, tuple[str, int]] = {
    "0x56a0": ("Arc A770", 16 * _GIB),
    "0xe20b": ("Arc B580", 12 * _GIB),
    "0xe211": ("Arc Pro B60", 24 * _GIB),
    "0xe222": ("Arc Pro B65", 32 * _GIB),
    "0xe223": ("Arc Pro B70", 32 * _GIB),
}
"""PCI device id → name and memory in bytes (Intel's product pages); others go by their id."""


@dataclass(frozen=True, slots=True)
class Card:
    """One GPU. `memory_bytes` is 0 where unknown; `bar_bytes` is the memory window (ReBAR)."""

    index: int
    level_zero_index: int
    name: str
    pci_address: str
    pci_id: str
    driver: str
    is_integrated: bool
    render_node: str | None = None
    memory_bytes: int = 0
    bar_bytes: int = 0
    is_simulated: bool = False

    @property
    def lock_name(self) -> str:
        """Name of the lock that the holder of this card owns."""
        return f"{'igpu' if self.is_integrated else 'arc'}-{self.index}"


@dataclass(frozen=True, slots=True)
class HostCards:
    """The map of a host's Intel GPUs, each group in PCI order."""

    discrete: tuple[Card, ...] = ()
    integrated: tuple[Card, ...] = ()


def list_cards(root: Path = Path("/"), env: Mapping[str, str] | None = None) -> HostCards:
    """Return this host's Intel GPUs; simulated ones, where declared, replace real ones of a kind.

    `root` is the folder under which `sys/class/drm` lies. Raises ConfigError on a bad count.
    """
    real = _read_cards(root)
    num_arc = read_count(SIMULATED_ARC_CARDS, env)
    num_igpu = read_count(SIMULATED_IGPUS, env)
    return HostCards(
        discrete=real.discrete if num_arc is None else _simulated(num_arc, is_integrated=False),
        integrated=real.integrated
        if num_igpu is None
        else _simulated(num_igpu, is_integrated=True),
    )


def _simulated(count: int, *, is_integrated: bool) -> tuple[Card, ...]:
    kind = "integrated GPU" if is_integrated else "Arc card"
    return tuple(
        Card(
            index=index,
            level_zero_index=index,
            name=f"Simulated {kind} {index}",
            pci_address=f"simulated:{index}",
            pci_id="",
            driver="cpu",
            is_integrated=is_integrated,
            is_simulated=True,
        )
        for index in range(count)
    )


def _read_cards(root: Path) -> HostCards:
    devices = sorted(_intel_gpu_folders(root / "sys/class/drm"), key=lambda path: path.name)
    discrete: list[Card] = []
    integrated: list[Card] = []
    for level_zero_index, device in enumerate(devices):
        is_integrated = _is_integrated(device)
        group = integrated if is_integrated else discrete
        group.append(_read_card(device, len(group), level_zero_index, is_integrated))
    return HostCards(tuple(discrete), tuple(integrated))


def _intel_gpu_folders(drm: Path) -> Iterable[Path]:
    """Yield the PCI folder, named by its address, of each Intel GPU that a driver is bound to."""
    if not drm.is_dir():
        return
    seen: set[Path] = set()
    for entry in drm.iterdir():
        if not _CARD_DIR.match(entry.name):
            continue
        device = (entry / "device").resolve()
        if device in seen or read_text(device / "vendor") != _INTEL:
            continue
        if (read_text(device / "class") or "").startswith(_DISPLAY_CLASSES) and _driver(device) in (
            "i915",
            "xe",
        ):
            seen.add(device)
            yield device


def _is_integrated(device: Path) -> bool:
    # Intel's integrated GPU is function 02.0 on the root bus; a card sits behind a bridge.
    return device.name.split(":", 1)[-1] == "00:02.0"


def _read_card(device: Path, index: int, level_zero_index: int, is_integrated: bool) -> Card:
    pci_id = read_text(device / "device") or ""
    bar_bytes = _memory_window(device)
    name, memory_bytes = _KNOWN_CARDS.get(pci_id, (f"Intel GPU {pci_id}", 0))
    return Card(
        index=index,
        level_zero_index=level_zero_index,
        name=name,
        pci_address=device.name,
        pci_id=pci_id,
        driver=_driver(device),
        is_integrated=is_integrated,
        render_node=_render_node(device),
        # A window beyond 256 MiB spans the whole memory: ReBAR is on.
        memory_bytes=memory_bytes or (bar_bytes if bar_bytes > 256 * _MIB else 0),
        bar_bytes=bar_bytes,
    )


def _driver(device: Path) -> str:
    link = device / "driver"
    return link.resolve().name if link.exists() else ""


def _render_node(device: Path) -> str | None:
    nodes = sorted(path.name for path in (device / "drm").glob("renderD*"))
    return f"/dev/dri/{nodes[0]}" if nodes else None


def _memory_window(device: Path) -> int:
    """Return the size in bytes of BAR 2: line 2 of `resource` holds its start, end and flags."""
    lines = (read_text(device / "resource") or "").splitlines()
    if len(lines) < 3:
        return 0
    try:
        start, end = (int(field, 16) for field in lines[2].split()[:2])
    except ValueError:
        return 0
    return end - start + 1 if end > start else 0
