"""Checks that measure: memory bandwidth, and a real product on each device."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from serve_app.doctor.cpu_checks import expected_bandwidth
from serve_app.doctor.host import Host
from serve_app.doctor.result import CheckResult, failed, passed, skipped, warned
from serve_app.hardware.accelerators import list_accelerators

_COPY_BYTES = 256 << 20
_NUM_COPIES = 5
_MATRIX = 1024
_GOOD_SHARE = 0.6
"""A copy reaches 70 to 90 % of the channels' rate; less means empty channels or another program."""
_TOLERANCE = 0.02


def check_memory_bandwidth(host: Host) -> Iterator[CheckResult]:
    """A copy within main memory, against channels x rate where the firmware tells them."""
    name = "memory bandwidth"
    torch = host.module("torch")
    if torch is None:
        yield skipped(name, "torch cannot be imported")
        return
    reached = measure_copy(torch, "cpu", lambda: None)
    evidence = f"a copy reaches {reached / 1e9:.1f} GB/s"
    limit = expected_bandwidth(host)
    if limit is None:
        yield passed(name, f"{evidence}; channels and rate unknown (sudo, dmidecode, EDAC)")
    elif reached < _GOOD_SHARE * limit:
        yield warned(
            name,
            f"{evidence} of {limit / 1e9:.1f} GB/s",
            "end other programs; populate every channel with equal modules",
            "memory-channels",
        )
    else:
        yield passed(name, f"{evidence} of {limit / 1e9:.1f} GB/s")


def measure_copy(torch: Any, device: str, synchronize: Callable[[], None]) -> float:
    """Return the best of five copies within `device`, bytes read and written per second."""
    source = torch.ones(_COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best_s = float("inf")
    for _ in range(_NUM_COPIES):
        synchronize()
        started = time.perf_counter()
        target.copy_(source)
        synchronize()
        best_s = min(best_s, time.perf_counter() - started)
    return 2 * _COPY_BYTES / best_s


def check_products(host: Host) -> Iterator[CheckResult]:
    """A bf16 product on each accelerator equals the CPU's, and its memory is copied at speed."""
    torch = host.module("torch")
    devices = () if torch is None else list_accelerators(torch)
    if not devices:
        yield skipped("product on a card", "torch sees no accelerator")
    for device in devices:
        name = f"product on {device.kind}:{device.index}"
        try:
            yield _check_product(torch, f"{device.kind}:{device.index}", name, device.name)
        except RuntimeError as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            yield failed(
                name, f"{device.name}: {reason}", f"xeray doctor explain '{reason}'", "engine-reset"
            )


def _check_product(torch: Any, device: str, name: str, card: str) -> CheckResult:
    synchronize = getattr(torch, device.split(":", maxsplit=1)[0]).synchronize
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(_MATRIX, _MATRIX, generator=generator) for _ in range(2))
    left, right = left.bfloat16(), right.bfloat16()
    product = (left.to(device) @ right.to(device)).float().cpu()
    reference = left.float() @ right.float()
    error = ((product - reference).norm() / reference.norm()).item()
    speed = measure_copy(torch, device, synchronize)
    evidence = f"{card}: relative error {error:.1e}, a copy reaches {speed / 1e9:.0f} GB/s"
    if not error < _TOLERANCE:  # NaN is not smaller either
        return failed(
            name, evidence, "xeray selftest; then the driver's version", "driver-rollback"
        )
    return passed(name, evidence)
