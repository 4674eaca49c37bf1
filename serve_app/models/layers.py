"""The small layers between the linear ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from serve_app.models.kernels._triton import has_kernel
from serve_app.models.kernels.activation import silu_and_mul as fused_silu_and_mul
from serve_app.models.kernels.cpu import CpuKernels, cpu_kernels
from serve_app.models.kernels.norm import rms_norm as fused_rms_norm

_CPU_GRAIN = 32768


class RMSNorm:
    """x / rms(x) · weight over the last dimension (Zhang and Sennrich, 1910.07467).

    `dtype` is that of what `add` yields beside the sum, the weight's by default.
    """

    __slots__ = ("_cpu", "_is_fused", "_shape", "dtype", "eps", "weight", "wide_weight")

    def __init__(self, weight: torch.Tensor, eps: float, dtype: torch.dtype | None = None) -> None:
        self.weight = weight
        self.eps = eps
        self.dtype = dtype or weight.dtype
        self._shape = (weight.shape[0],)
        self._is_fused = has_kernel("norm", weight)
        self.wide_weight = weight.float()
        self._cpu = cpu_kernels(weight) if CpuKernels.takes(weight.shape[0]) else None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[..., H] → [..., H]."""
        return F.rms_norm(x, self._shape, self.weight, self.eps)

    def add(
        self, x: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[T, H] → (norm of x + residual in `dtype`, float32 x + residual), in one kernel.

        The sum is float32 on every device: it costs little (a row is some kB), and halves the
        divergence from the float32 model (KL per token of the embedded model: 1.2e-3 to 0.4e-3
        with `OutputHead`). x may be wider than the weight, as a mixture's output is.
        """
        if self._is_fused:
            return fused_rms_norm(x, residual, self.weight, self.eps, self.dtype)
        if self._cpu is not None and x.dtype is self.weight.dtype is self.dtype:
            return self._cpu.add_rms_norm(x, residual, self.wide_weight, self.eps)
        summed = x.float() if residual is None else residual + x
        normed = F.rms_norm(summed, self._shape, self.wide_weight, self.eps)
        return normed.to(self.dtype), summed


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Rotate heads [T, H, D] in place; cos, sin: their rows of `rotary_table`, [T, 1, D]."""
    rolled = x.roll(x.shape[-1] // 2, -1)
    x.mul_(cos).add_(rolled.mul_(sin))


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) · up for [T, 2I] → [T, I]."""
    if has_kernel("activation", gate_up):
        return fused_silu_and_mul(gate_up)
    if (cpu := _cpu_activation(gate_up)) is not None:
        return cpu.silu_and_mul(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def row_invariant_silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """As `silu_and_mul`, with the same bits for a row in any batch.

    ATen's CPU loops cut a large tensor between threads anywhere in a row, and the elements before
    a cut go through scalar code whose exp differs in the last bit. Below the grain size of its
    loops a tensor stays whole, so that each row is cut alike.
    """
    if gate_up.device.type != "cpu" or _cpu_activation(gate_up) is not None:
        return silu_and_mul(gate_up)
    num_rows = max(1, (_CPU_GRAIN - 1) // (gate_up.shape[1] // 2))
    if gate_up.shape[0] <= num_rows:
        return silu_and_mul(gate_up)
    return torch.cat([silu_and_mul(rows) for rows in torch.split(gate_up, num_rows)])


def _cpu_activation(gate_up: torch.Tensor) -> CpuKernels | None:
    return cpu_kernels(gate_up) if CpuKernels.takes(gate_up.shape[1] // 2) else None
