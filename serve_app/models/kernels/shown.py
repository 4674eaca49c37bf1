"""Our compiled CPU operators under PyTorch's profiler, which sees its own operators only.

The calls are wrapped on their classes while a profile runs, and unwrapped after it: a call pays
nothing while none does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from serve_app.models.cpu_step import CpuDecodeStep
from serve_app.models.kernels.cpu import CpuKernels
from serve_app.models.kernels.cpu_packed import PackedCpuKernel

_SHOWN: tuple[tuple[type, str, str], ...] = (
    (CpuKernels, "add_rms_norm", "add_rms_norm"),
    (CpuKernels, "silu_and_mul", "silu_and_mul"),
    (CpuKernels, "rotate_and_cache", "rotate_and_cache"),
    (CpuKernels, "decode_attention", "decode_attention"),
    (PackedCpuKernel, "__call__", "packed_linear"),
)


class ShownOperators:
    """Records each call of our CPU operators from `show` to `hide`; one profile at a time.

    Args:
        prefix: how their names begin in the trace.
    """

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._originals: list[tuple[type, str, Callable[..., Any]]] = []

    def show(self) -> None:
        """Wrap the calls."""
        assert not self._originals, "shown already"
        CpuDecodeStep.is_on = False  # its calls are made from C++
        for owner, attribute, name in _SHOWN:
            original = vars(owner)[attribute]
            self._originals.append((owner, attribute, original))
            setattr(owner, attribute, _recorded(original, self._prefix + name))

    def hide(self) -> None:
        """Unwrap them; without effect where they are not wrapped."""
        CpuDecodeStep.is_on = True
        while self._originals:
            setattr(*self._originals.pop())


def _recorded(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    # A tenth of the time of the public one, which goes through the dispatcher twice.
    record = getattr(torch._C._profiler, "_RecordFunctionFast", torch.profiler.record_function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with record(name):
            return function(*args, **kwargs)

    return call
