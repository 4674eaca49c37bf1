"""Our compiled CPU operators under PyTorch's profiler."""

from __future__ import annotations

import pytest
import torch

from serve_app.models.kernels.cpu import CpuKernels, cpu_kernels
from serve_app.models.kernels.shown import ShownOperators


def names_seen(kernels: CpuKernels) -> list[str]:
    with torch.autograd.profiler.profile(use_kineto=True) as profile:
        kernels.silu_and_mul(torch.ones(2, 64))
    return [event.name for event in profile.function_events]


def test_they_show_between_show_and_hide_and_cost_nothing_otherwise():
    kernels = cpu_kernels(torch.empty(0))
    if kernels is None:
        pytest.skip("this machine cannot compile them")
    original = CpuKernels.silu_and_mul
    operators = ShownOperators("ours::")
    operators.show()
    try:
        seen = names_seen(kernels)
    finally:
        operators.hide()
        operators.hide()
    assert seen[seen.index("ours::silu_and_mul") + 1] == "aten::new_empty", (
        "its own calls lie within"
    )
    assert CpuKernels.silu_and_mul is original, "a call is what it was, and as cheap"
    assert "ours::silu_and_mul" not in names_seen(kernels)
