"""The files that bound a card's clock and power.

Units and files: the kernel's ABI documentation of i915 and xe (see `hardware.telemetry.gpu`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from serve_app.core.errors import ConfigError
from serve_app.hardware.cards import Card
from serve_app.hardware.sysfs import read_int, read_text

_HWMON_NAMES = ("xe", "i915")
_MICROWATTS = 1_000_000


@dataclass(frozen=True, slots=True)
class CapFile:
    """One limit of a card: the file, what it holds now, and its bounds. Units: MHz or watts.

    `factor` is what one unit is in the file (hwmon counts microwatts).
    """

    path: Path
    label: str
    unit: str
    value: float
    low: float
    high: float
    factor: int = 1

    def raw(self, value: float) -> str:
        """Return what to write for `value`. Raises ConfigError outside of the bounds."""
        if not self.low <= value <= self.high:
            raise ConfigError(
                f"{self.label}: {value:g} {self.unit} is not within "
                f"{self.low:g} to {self.high:g} {self.unit}",
                param=self.label,
            )
        return str(round(value * self.factor))


def frequency_caps(card: Card, root: Path = Path("/")) -> list[CapFile]:
    """Return the largest clock of each tile, MHz; empty where the driver offers none."""
    device = root / "sys/bus/pci/devices" / card.pci_address
    if card.driver == "xe":
        folders = [path.parent for path in sorted(device.glob("tile*/gt*/freq0/max_freq"))]
        names = ("max_freq", "rpn_freq", "rp0_freq")
    else:
        folders = [path.parent for path in sorted(device.glob("drm/card*/gt/gt*/rps_max_freq_mhz"))]
        names = ("rps_max_freq_mhz", "rps_RPn_freq_mhz", "rps_RP0_freq_mhz")
    caps = []
    for folder in folders:
        value, low, high = (read_int(folder / name) for name in names)
        if value is not None and high is not None:
            # xe: …/tile0/gt0/freq0; i915: …/gt/gt0
            tile = folder.parent.name if folder.name == "freq0" else folder.name
            label = f"{card.lock_name} {tile} clock"
            caps.append(CapFile(folder / names[0], label, "MHz", value, low or 0, high))
    return caps


def power_cap(card: Card, root: Path = Path("/")) -> CapFile | None:
    """Return the card's sustained power limit, watts; None where the driver offers none."""
    device = root / "sys/bus/pci/devices" / card.pci_address
    for folder in sorted((device / "hwmon").glob("hwmon*")):
        if read_text(folder / "name") not in _HWMON_NAMES:
            continue
        value = read_int(folder / "power1_max")
        rated = read_int(folder / "power1_rated_max") or value
        if value and rated:
            watts = value / _MICROWATTS
            return CapFile(
                folder / "power1_max",
                f"{card.lock_name} power",
                "W",
                watts,
                0.2 * rated / _MICROWATTS,  # below that cards reject the value or stall
                max(rated / _MICROWATTS, watts),
                _MICROWATTS,
            )
    return None


def write_all(values: Sequence[tuple[Path, str]]) -> None:
    """Write each value into its file. Raises ConfigError where that is not allowed."""
    for path, text in values:
        try:
            path.write_text(text)
        except OSError as error:
            raise ConfigError(
                f"{path} cannot be written ({error.strerror}); run as root"
            ) from error
