from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

from serve_app.hardware.accelerators import best_device, list_accelerators


class FakeDevices:
    """One torch device module, such as torch.xpu, with cards that are not here."""

    def __init__(self, *cards: tuple[str, int], tells_free: bool = True) -> None:
        self._cards = cards
        self._tells_free = tells_free

    def is_available(self) -> bool:
        return bool(self._cards)

    def device_count(self) -> int:
        return len(self._cards)

    def get_device_properties(self, index: int) -> Any:
        name, memory_bytes = self._cards[index]
        return SimpleNamespace(name=name, total_memory=memory_bytes)

    def mem_get_info(self, index: int) -> tuple[int, int]:
        if not self._tells_free:
            raise RuntimeError("The device does not support querying the available free memory.")
        return self._cards[index][1] // 2, self._cards[index][1]


def test_arc_cards_come_before_others() -> None:
    torch = SimpleNamespace(
        xpu=FakeDevices(("Intel(R) Arc(TM) A770 Graphics", 16 << 30)),
        cuda=FakeDevices(("NVIDIA H100", 80 << 30)),
    )

    first, second = list_accelerators(torch)

    assert (first.kind, first.index, first.memory_bytes) == ("xpu", 0, 16 << 30)
    assert first.free_bytes == 8 << 30
    assert second.kind == "cuda"
    assert best_device(torch) == "xpu"


def test_a_driver_that_cannot_tell_free_memory() -> None:
    torch = SimpleNamespace(xpu=FakeDevices(("Arc", 16 << 30), tells_free=False))

    assert list_accelerators(torch)[0].free_bytes is None


def test_a_torch_without_any_is_cpu() -> None:
    assert best_device(SimpleNamespace(cuda=FakeDevices())) == "cpu"


def test_importing_the_hardware_package_does_not_import_torch() -> None:
    code = (
        "import sys, serve_app.hardware.accelerators, serve_app.hardware.capacity,"
        " serve_app.hardware.cpu; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
