"""Dense products on cards whose float32 sums are kept, not rounded to the activations' type.

A bfloat16 result has 8 bits: near 5, where a model's best logits lie, it comes in steps of 0.03,
and what two ranks each round before they are added is not what one card would have rounded.
"""

from __future__ import annotations

from functools import cache

import torch

from serve_app.models.kernels.gemv import skinny_linear
from serve_app.models.matmul import DenseKernel, skinny_kernel


class WideKernel(DenseKernel):
    """x · Wᵀ (+ bias) as float32 [T, N], for a bfloat16 or float16 weight.

    One row goes through the kernel that reads the weight once, where `is_skinny` allows it.
    """

    __slots__ = ("_is_skinny",)

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None = None, *, is_skinny: bool = True
    ) -> None:
        super().__init__(weight, bias)
        self._is_skinny = is_skinny and skinny_kernel(self) is not None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[T, K] → float32 [T, N]."""
        x = x.to(self.weight.dtype)
        if self._is_skinny and x.shape[0] == 1:
            return skinny_linear(x, self.weight, self.bias, out_dtype=torch.float32)
        y = torch.mm(x, self.weight.T, out_dtype=torch.float32)
        return y if self.bias is None else y.add_(self.bias)


def wide_kernel(
    weight: torch.Tensor, bias: torch.Tensor | None = None, *, is_skinny: bool = True
) -> WideKernel | None:
    """The kernel for a dense weight, or None: on CPUs, for float32, and where torch has no product.

    `is_skinny=False` keeps one kernel for any number of rows.
    """
    is_narrow = weight.dtype in (torch.bfloat16, torch.float16)
    if weight.device.type == "cpu" or not is_narrow:
        return None
    if not _has_wide_product(weight.device, weight.dtype):
        return None
    return WideKernel(weight, bias, is_skinny=is_skinny)


@cache
def _has_wide_product(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the device multiplies a small matrix so; tried once per process."""
    x = torch.full((2, 64), 1.0, dtype=dtype, device=device)
    weight = torch.full((32, 64), 1.0, dtype=dtype, device=device)
    weight[:, 0] = 2.0**-9
    try:
        y = torch.mm(x, weight.T, out_dtype=torch.float32)
    except (RuntimeError, NotImplementedError, TypeError):
        return False
    return bool((y == 63 + 2.0**-9).all())
