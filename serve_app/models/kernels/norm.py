"""Residual add and RMSNorm in one pass (Zhang and Sennrich, 1910.07467)."""

import torch

from serve_app.models.kernels._triton import (
    has_kernel,
    next_power_of_2,
    overlap_options,
    tl,
    triton,
    wait_for_inputs,
)


def rms_norm(
    hidden: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (normed, new residual), both [T, H] in hidden's dtype.

    hidden, residual: [T, H], one dtype; weight: [H]. The new residual is hidden + residual, rounded
    to the dtype before it is normed; without a residual it is `hidden` itself.
    """
    if not has_kernel("norm", hidden):
        return rms_norm_torch(hidden, residual, weight, eps)
    num_rows, size = hidden.shape
    normed = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    summed = hidden if residual is None else torch.empty_like(normed)
    if num_rows == 0:
        return normed, summed
    block = next_power_of_2(size)
    _rms_norm_kernel[(num_rows,)](
        hidden,
        hidden if residual is None else residual,
        weight,
        normed,
        summed,
        eps,
        hidden.stride(0),
        hidden.stride(0) if residual is None else residual.stride(0),
        SIZE=size,
        BLOCK=block,
        HAS_RESIDUAL=residual is not None,
        num_warps=min(16, max(1, block // 512)),
        **overlap_options(hidden),
    )
    return normed, summed


def rms_norm_torch(
    hidden: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Do what rms_norm does, in PyTorch."""
    summed = hidden if residual is None else hidden + residual
    wide = summed.float()
    scaled = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return scaled.to(hidden.dtype) * weight, summed


@triton.jit
def _rms_norm_kernel(
    hidden_ptr,
    residual_ptr,
    weight_ptr,
    normed_ptr,
    summed_ptr,
    eps,
    hidden_stride,
    residual_stride,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < SIZE
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0)
    wait_for_inputs(OVERLAPS)
    values = tl.load(hidden_ptr + row * hidden_stride + columns, mask=mask, other=0.0)
    if HAS_RESIDUAL:
        old = tl.load(residual_ptr + row * residual_stride + columns, mask=mask, other=0.0)
        values = (values.to(tl.float32) + old.to(tl.float32)).to(values.dtype)
        tl.store(summed_ptr + row * SIZE + columns, values, mask=mask)
    wide = values.to(tl.float32)
    mean = tl.sum(wide * wide, axis=0) / SIZE
    scaled = (wide * (1.0 / tl.sqrt(mean + eps))).to(values.dtype)
    normed = scaled.to(tl.float32) * weight.to(tl.float32)
    tl.store(normed_ptr + row * SIZE + columns, normed.to(values.dtype), mask=mask)
