"""SiLU(gate) · up on the packed output of the gate_up projection (SwiGLU, Shazeer 2002.05202)."""

import torch
import torch.nn.functional as F

from serve_app.models.kernels._triton import (
    cdiv,
    has_kernel,
    next_power_of_2,
    overlap_options,
    tl,
    triton,
    wait_for_inputs,
)


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """[T, 2I], the gate in the first half of each row → [T, I] in the same dtype."""
    if not has_kernel("activation", gate_up):
        return silu_and_mul_torch(gate_up)
    num_rows, width = gate_up.shape
    size = width // 2
    output = torch.empty((num_rows, size), dtype=gate_up.dtype, device=gate_up.device)
    if num_rows == 0:
        return output
    block = min(1024, next_power_of_2(size))
    _silu_and_mul_kernel[(num_rows, cdiv(size, block))](
        gate_up,
        output,
        gate_up.stride(0),
        SIZE=size,
        BLOCK=block,
        num_warps=4,
        **overlap_options(gate_up),
    )
    return output


def silu_and_mul_torch(gate_up: torch.Tensor) -> torch.Tensor:
    """Do what silu_and_mul does, in PyTorch."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


@triton.jit
def _silu_and_mul_kernel(
    gate_up_ptr,
    output_ptr,
    row_stride,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < SIZE
    base = gate_up_ptr + row * row_stride
    wait_for_inputs(OVERLAPS)
    gate = tl.load(base + columns, mask=mask, other=0.0)
    up = tl.load(base + SIZE + columns, mask=mask, other=0.0)
    wide = gate.to(tl.float32)
    # rounded between the two steps, as F.silu followed by a product rounds
    activated = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype)
    product = activated.to(tl.float32) * up.to(tl.float32)
    tl.store(output_ptr + row * SIZE + columns, product.to(gate.dtype), mask=mask)
