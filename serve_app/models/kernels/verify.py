"""Runs each kernel once on a device beside its twin in float32 on the CPU, on the same inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from serve_app.models.kernels._triton import has_kernel
from serve_app.models.kernels.activation import silu_and_mul, silu_and_mul_torch
from serve_app.models.kernels.gemv import skinny_linear
from serve_app.models.kernels.int4_gemv import arrange_int4, dequantize_int4, int4_linear
from serve_app.models.kernels.int4_pack import (
    GROUP_SIZES,
    dequantize_int4_torch,
    int4_linear_torch,
    pack_int4,
)
from serve_app.models.kernels.norm import rms_norm, rms_norm_torch
from serve_app.models.kernels.paged_decode import paged_decode, paged_decode_torch
from serve_app.models.kernels.rope import rope_and_cache, rope_and_cache_torch

LIMITS = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}
"""Largest relative difference that each type's rounding explains."""

_HEADS, _KV_HEADS, _HEAD_DIM, _BLOCK_SIZE, _NUM_BLOCKS = 8, 2, 64, 16, 64

Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True, slots=True)
class KernelCheck:
    """One comparison: ‖result − expected‖ / ‖expected‖ beside its limit.

    `is_kernel`: our kernel ran on the device, not its PyTorch twin.
    """

    kernel: str
    case: str
    is_kernel: bool
    difference: float
    limit: float

    @property
    def is_ok(self) -> bool:
        """False also for a NaN."""
        return self.difference <= self.limit


def check_kernels(device: torch.device, dtype: torch.dtype, seed: int = 0) -> Iterator[KernelCheck]:
    """Yield each kernel's cases on `device` with activations in `dtype`."""
    make = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=make).to(dtype)

    def compare(
        kernel: str,
        case: str,
        inputs: Tensors,
        run: Callable[..., torch.Tensor],
        twin: Callable[..., torch.Tensor],
    ) -> KernelCheck:
        there = tuple(tensor.to(device) for tensor in inputs)
        wide = tuple(t.float() if t.is_floating_point() else t for t in inputs)
        result, expected = run(*there).double().cpu(), twin(*wide).double()
        difference = float((result - expected).norm() / expected.norm().clamp_min(1e-30))
        return KernelCheck(kernel, case, has_kernel(kernel, there[0]), difference, LIMITS[dtype])

    for num_rows in (1, 5, 64):
        case = f"{num_rows} rows"
        yield compare(
            "norm", case, (random(num_rows, 576), random(num_rows, 576).float(), random(576)),
            lambda x, r, w: rms_norm(x, r, w, 1e-6)[0],
            lambda x, r, w: rms_norm_torch(x, r, w, 1e-6)[0],
        )  # fmt: skip
        yield compare(
            "activation", case, (random(num_rows, 3072),), silu_and_mul, silu_and_mul_torch
        )
        yield compare("rope", case, _rope_inputs(num_rows, random), _rope, _rope_twin)
        yield compare("paged_decode", case, _decode_inputs(num_rows, random), _decode, _decode_twin)
        yield compare(
            "gemv", case, (random(num_rows, 576), random(1000, 576), random(1000)),
            skinny_linear, torch.nn.functional.linear,
        )  # fmt: skip
    for group_size in GROUP_SIZES:
        yield from _int4_checks(compare, random, make, group_size)


def _rope_inputs(num_rows: int, random: Callable[..., torch.Tensor]) -> Tensors:
    angles = random(num_rows, _HEAD_DIM // 2).float()
    slots = torch.arange(_BLOCK_SIZE, _BLOCK_SIZE + num_rows)
    qkv = random(num_rows, (_HEADS + 2 * _KV_HEADS) * _HEAD_DIM)
    cache = random(2, _NUM_BLOCKS, _BLOCK_SIZE, _KV_HEADS, _HEAD_DIM)
    return qkv, angles.cos(), angles.sin(), slots, cache


def _rope(*inputs: torch.Tensor) -> torch.Tensor:
    query = rope_and_cache(*inputs, _HEADS)
    return torch.cat((query.flatten(), inputs[-1].flatten()))


def _rope_twin(*inputs: torch.Tensor) -> torch.Tensor:
    query = rope_and_cache_torch(*inputs, _HEADS)
    return torch.cat((query.flatten(), inputs[-1].flatten()))


def _decode_inputs(num_rows: int, random: Callable[..., torch.Tensor]) -> Tensors:
    lens = 1 + torch.arange(num_rows) * 37 % 250
    tables = 1 + torch.arange(num_rows * 16).view(num_rows, 16) * 7 % (_NUM_BLOCKS - 1)
    query = random(num_rows, _HEADS, _HEAD_DIM)
    return query, random(2, _NUM_BLOCKS, _BLOCK_SIZE, _KV_HEADS, _HEAD_DIM), tables, lens


def _decode(*inputs: torch.Tensor) -> torch.Tensor:
    return paged_decode(*inputs, 256, _HEAD_DIM**-0.5)


def _decode_twin(*inputs: torch.Tensor) -> torch.Tensor:
    return paged_decode_torch(*inputs, 256, _HEAD_DIM**-0.5)


def _int4_checks(
    compare: Callable[..., KernelCheck],
    random: Callable[..., torch.Tensor],
    make: torch.Generator,
    group_size: int,
) -> Iterator[KernelCheck]:
    for size in (528, 37):  # in tiles for the tensor cores where the device has them, and by rows
        quantized = torch.randint(0, 16, (size, 1024), generator=make, dtype=torch.uint8)
        scales = torch.rand(1024 // group_size, size, generator=make) * 0.02 + 0.001
        zeros = torch.rand(1024 // group_size, size, generator=make) * 15
        weight = pack_int4(quantized, scales, zeros)
        for num_rows in (1, 2, 4, 17, 130):
            yield compare(
                "int4", f"{num_rows} rows × [{size}, 1024], groups of {group_size}",
                (random(num_rows, 1024),),
                lambda x, w=weight: int4_linear(x, arrange_int4(w.to(x.device))),
                lambda x, w=weight: int4_linear_torch(x, w),
            )  # fmt: skip
        yield compare(
            "int4", f"dequantize [{size}, 1024], groups of {group_size}", (random(1),),
            lambda x, w=weight: dequantize_int4(arrange_int4(w.to(x.device)), x.dtype),
            lambda x, w=weight: dequantize_int4_torch(w, x.dtype),
        )  # fmt: skip
