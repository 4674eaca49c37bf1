"""Joules between two moments: cards by their counters, packages by RAPL, NVIDIA by its reading."""

from __future__ import annotations

import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from serve_app.hardware.cards import list_cards
from serve_app.hardware.telemetry.cpu import read_host
from serve_app.hardware.telemetry.gpu import read_gpu

_NVIDIA_QUERY = (
    "nvidia-smi",
    "--query-gpu=index,power.draw",
    "--format=csv,noheader,nounits",
    "--loop-ms=200",
)
_END_TIMEOUT_S = 5.0


def missing_sources(
    root: Path = Path("/"), nvidia_command: Sequence[str] = _NVIDIA_QUERY
) -> list[str]:
    """Say of each source of joules that cannot be read why not, one line each."""
    found = list_cards(root, {})
    cards = (*found.discrete, *found.integrated)
    missing = []
    if not read_host(root).energy_j:
        has_rapl = any((root / "sys/class/powercap").glob("intel-rapl:[0-9]*"))
        missing.append(
            "RAPL's counters need root"
            if has_rapl
            else "this machine has no RAPL (most virtual machines have none)"
        )
    if not cards:
        missing.append("no Intel card")
    elif not any(read_gpu(card, root).energy_j is not None for card in cards):
        missing.append("the driver of no card tells its energy")
    if shutil.which(nvidia_command[0]) is None:
        missing.append("no nvidia-smi")
    return missing


class EnergyMeter:
    """A context manager; `joules` then has one entry for each source that could be read.

    Sources: `arc-0` and so on (energy1_input), `package-0` (RAPL; root only on most kernels), and
    `nvidia-0` (power.draw, integrated every 200 ms; nothing of the card is changed).
    """

    def __init__(
        self,
        root: Path = Path("/"),
        nvidia_command: Sequence[str] = _NVIDIA_QUERY,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._root = root
        self._nvidia = _PowerIntegrator(nvidia_command, clock)
        self._before: Mapping[str, float] = {}
        self.joules: dict[str, float] = {}

    def __enter__(self) -> Self:
        self._nvidia.start()
        self._before = dict(self._counters())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        ranges = read_host(self._root).energy_range_j
        for name, now_j in self._counters():
            before_j = self._before.get(name)
            if before_j is not None:
                if now_j < before_j:  # RAPL wraps where the kernel says; a card's counter does not
                    now_j += ranges.get(name, before_j - now_j)
                self.joules[name] = now_j - before_j
        self.joules |= self._nvidia.stop()

    def _counters(self) -> Iterator[tuple[str, float]]:
        found = list_cards(self._root, {})
        for card in (*found.discrete, *found.integrated):
            energy_j = read_gpu(card, self._root).energy_j
            if energy_j is not None:
                yield card.lock_name, energy_j
        yield from read_host(self._root).energy_j.items()


class _PowerIntegrator:
    """Integrates lines of "index, watts" from a program; without the program nothing."""

    def __init__(self, command: Sequence[str], clock: Callable[[], float]) -> None:
        self._command = command
        self._clock = clock
        self._process: subprocess.Popen[str] | None = None
        self._thread: threading.Thread | None = None
        self._joules: dict[str, float] = {}
        self._last: dict[str, tuple[float, float]] = {}

    def start(self) -> None:
        with suppress(OSError):
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            self._thread = threading.Thread(target=self._read, daemon=True)
            self._thread.start()

    def _read(self) -> None:
        assert self._process is not None, "started before"
        assert self._process.stdout is not None, "piped"
        for line in self._process.stdout:
            index, _, watts = line.partition(",")
            with suppress(ValueError):  # "[N/A]": this card does not tell
                self._add(f"nvidia-{int(index)}", float(watts), self._clock())

    def _add(self, name: str, watts: float, now_s: float) -> None:
        if name in self._last:
            last_s, last_watts = self._last[name]
            joules = (watts + last_watts) / 2 * (now_s - last_s)
            self._joules[name] = self._joules.get(name, 0.0) + joules
        self._last[name] = (now_s, watts)

    def stop(self) -> dict[str, float]:
        if self._process is None or self._thread is None:
            return {}
        self._process.terminate()
        self._process.wait(_END_TIMEOUT_S)
        self._thread.join(_END_TIMEOUT_S)
        assert self._process.stdout is not None, "piped"
        self._process.stdout.close()
        # The interval since the last line: at the power that it told.
        now_s = self._clock()
        for name, (_, watts) in dict(self._last).items():
            self._add(name, watts, now_s)
        return self._joules
