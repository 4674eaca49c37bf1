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
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (normed [T, H] in `dtype`, or weight's, new residual [T, H] in float32).

    hidden: [T, H]; residual: [T, H] or None; weight: [H], each in a dtype of its own. The new
    residual is hidden + residual, or hidden. It stays float32 from layer to layer: rounded to
    bfloat16 after each it would lose most of what the last layers add.
    """
    if not has_kernel("norm", hidden):
        return rms_norm_torch(hidden, residual, weight, eps, dtype)
    num_rows, size = hidden.shape
    normed = torch.empty((num_rows, size), dtype=dtype or weight.dtype, device=hidden.device)
    summed = torch.empty((num_rows, size), dtype=torch.float32, device=hidden.device)
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
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Do what rms_norm does, in PyTorch."""
    summed = hidden.float() if residual is None else hidden.float() + residual
    scaled = summed * torch.rsqrt(summed.square().mean(dim=-1, keepdim=True) + eps)
    return (scaled * weight.float()).to(dtype or weight.dtype), summed


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
    wide = tl.load(hidden_ptr + row * hidden_stride + columns, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        old = tl.load(residual_ptr + row * residual_stride + columns, mask=mask, other=0.0)
        wide += old.to(tl.float32)
    tl.store(summed_ptr + row * SIZE + columns, wide, mask=mask)
    mean = tl.sum(wide * wide, axis=0) / SIZE
    normed = wide * (1.0 / tl.sqrt(mean + eps)) * weight.to(tl.float32)
    tl.store(normed_ptr + row * SIZE + columns, normed.to(normed_ptr.dtype.element_ty), mask=mask)
