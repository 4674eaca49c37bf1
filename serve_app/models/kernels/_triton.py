"""The one place that knows whether Triton is there, and which kernels are switched off."""

import functools
import os
import types
from collections.abc import Callable
from typing import Any

import torch

from serve_app.core.errors import ConfigError

KERNEL_NAMES = (
    "norm",
    "activation",
    "rope",
    "paged_decode",
    "int4",
    "gemv",
    "sampling",
    "overlap",
    "experts",
    "cpu",
    "cpu_packed",
    "cpu_prefill",
    "cpu_step",
)
DISABLE_VARIABLE = "XERAY_DISABLE_KERNELS"

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:  # the twins run; the decorators below keep the kernel modules importable
    HAS_TRITON = False

    def _jit(function: Callable[..., Any] | None = None, **_options: Any) -> Any:
        return _jit if function is None else function

    triton = types.SimpleNamespace(jit=_jit)
    tl = types.SimpleNamespace(constexpr=object)

IS_INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"
_CARD_TYPES = frozenset({"cuda", "xpu"})
_MAX_OVERLAP_ROWS = 4


@functools.cache
def disabled_kernels() -> frozenset[str]:
    """Return the names in XERAY_DISABLE_KERNELS (`name,name` or `all`), read once.

    Raises ConfigError for a name that no kernel has.
    """
    names = {name.strip() for name in os.environ.get(DISABLE_VARIABLE, "").split(",")} - {""}
    unknown = names - {*KERNEL_NAMES, "all"}
    if unknown:
        raise ConfigError(
            f"{DISABLE_VARIABLE} names {', '.join(sorted(unknown))}: expected all or some of "
            f"{', '.join(KERNEL_NAMES)}",
            param=DISABLE_VARIABLE,
        )
    return frozenset(KERNEL_NAMES) if "all" in names else frozenset(names)


def has_kernel(name: str, tensor: torch.Tensor) -> bool:
    """Return whether the kernel `name` runs for a tensor on this device; else its twin does."""
    if not HAS_TRITON or name in disabled_kernels():
        return False
    return IS_INTERPRETED or tensor.device.type in _CARD_TYPES


def overlap_options(rows: torch.Tensor) -> dict[str, bool]:
    """Return what lets a kernel start while the one before it ends, for up to four `rows` [T, ...].

    For Hopper and later cards. Such a kernel calls `wait_for_inputs` before it reads what others
    write or writes anything. With more rows kernels are long enough, and those that wait only take
    places from those that work. XERAY_DISABLE_KERNELS=overlap turns it off.
    """
    if rows.shape[0] > _MAX_OVERLAP_ROWS or not _can_overlap(rows.device):
        return {"OVERLAPS": False}
    return {"OVERLAPS": True, "launch_pdl": True}


@functools.cache
def _can_overlap(device: torch.device) -> bool:
    if not HAS_TRITON or IS_INTERPRETED or "overlap" in disabled_kernels():
        return False
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@triton.jit
def wait_for_inputs(OVERLAPS: tl.constexpr):
    """Let the next kernel's programs take their places, and wait for the kernels before this."""
    if OVERLAPS:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@functools.cache
def num_compute_units(device: torch.device) -> int:
    """Return the card's multiprocessors (CUDA) or Xe-cores (XPU); 4 elsewhere."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).multi_processor_count)
    if device.type == "xpu":
        properties = torch.xpu.get_device_properties(device)
        return max(1, int(getattr(properties, "gpu_subslice_count", 0) or 16))
    return 4


def next_power_of_2(number: int) -> int:
    """Return the least power of two ≥ number (1 for 0)."""
    return 1 << max(0, number - 1).bit_length()


def cdiv(numerator: int, denominator: int) -> int:
    """Return the quotient rounded up."""
    return -(-numerator // denominator)
