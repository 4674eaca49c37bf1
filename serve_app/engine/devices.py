"""Which device, compute type and CPU threads an engine uses."""

from __future__ import annotations

import functools
import gc
import logging
import os
import time
from pathlib import Path

import torch

from serve_app.core.errors import ConfigError
from serve_app.hardware.cpu import read_cpu_info
from serve_app.hardware.numa import place_memory
from serve_app.models.kernels.benchmark import measure_copy_bandwidth

_LOG = logging.getLogger(__name__)
_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_CPU_COPY_BYTES = 256 << 20
_FAST_BF16_FLAGS = {"amx_bf16", "avx512_bf16"}


def resolve_device(name: str) -> torch.device:
    """The device that `engine.device` means. Raises ConfigError where it is not there."""
    if name == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        name = found.type if found is not None and found.type in ("cuda", "xpu") else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    module = torch.get_device_module(name)
    if not module.is_available():
        raise ConfigError(
            f"engine.device: {name} is not available to this build of torch ({torch.__version__});"
            f" install torch for {name}, or set engine.device: cpu",
            param="engine.device",
        )
    return torch.device(name, module.current_device())


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The type that `engine.dtype` means; auto is bfloat16 where the device is fast at it."""
    if name != "auto":
        return _DTYPES[name]
    if device.type != "cpu" or _cpu_flags() & _FAST_BF16_FLAGS:
        return torch.bfloat16
    return torch.float32


def device_name(device: torch.device) -> str:
    """The product name of the device."""
    if device.type == "cpu":
        return _cpuinfo_value("model name") or "CPU"
    return str(torch.get_device_module(device).get_device_name(device))


@functools.cache
def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written a second by the best of some large copies within the device.

    Measured once in a process, in some tens of milliseconds on a card, before memory is filled.
    """
    if device.type != "cpu":
        bandwidth = measure_copy_bandwidth(device)
        torch.get_device_module(device).empty_cache()
        return bandwidth
    source = torch.ones(_CPU_COPY_BYTES, dtype=torch.uint8)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - started)
    return 2 * _CPU_COPY_BYTES / min(seconds)


def release_cached_memory(device: torch.device) -> None:
    """Give the allocator's unused memory back to the device, which waits for it. No-op on a CPU."""
    gc.collect()
    if device.type != "cpu":
        module = torch.get_device_module(device)
        module.synchronize()
        module.empty_cache()


def physical_cpu_ids(allowed: set[int], sysfs: Path = Path("/sys/devices/system/cpu")) -> list[int]:
    """One logical CPU per physical core among `allowed`, ascending."""
    chosen: dict[str, int] = {}
    for cpu in sorted(allowed):
        siblings = sysfs / f"cpu{cpu}/topology/thread_siblings_list"
        core = siblings.read_text().strip() if siblings.is_file() else str(cpu)
        chosen.setdefault(core, cpu)
    return sorted(chosen.values())


def pin_threads(num_threads: int | None, cpu_ids: tuple[int, ...] | None) -> int:
    """Bind this process to physical cores and return its number of compute threads.

    `cpu_ids` are the cores to use, given by whoever shares the machine out; without them the
    process keeps to one logical CPU of each core it may run on. Its memory is taken beside them.
    Call it before torch computes and before weights are read.
    """
    allowed = os.sched_getaffinity(0)
    cores = physical_cpu_ids(set(cpu_ids) if cpu_ids else allowed)
    threads = min(num_threads or len(cores), len(cores))
    os.sched_setaffinity(0, cores)
    if placed := place_memory(cores, read_cpu_info().numa_nodes):
        _LOG.info("%d threads, %s", threads, placed)
    torch.set_num_threads(threads)
    return threads


def _cpuinfo_value(key: str) -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith(key):
            return line.split(":", 1)[1].strip()
    return ""


def _cpu_flags() -> set[str]:
    return set(_cpuinfo_value("flags").split())


def is_device_lost(device: torch.device) -> bool:
    """Return whether an accelerator no longer answers; a CPU always does."""
    if device.type == "cpu":
        return False
    try:
        torch.get_device_module(device).synchronize()
    except Exception:
        return True
    return False
