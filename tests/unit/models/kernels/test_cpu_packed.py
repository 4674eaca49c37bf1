"""Products with packed weights beside the exact ones, and the bits of a row in any batch."""

from __future__ import annotations

import pytest
import torch

from serve_app.models.kernels import cpu_packed
from serve_app.models.kernels.cpu_packed import Means, PackedCpuKernel, packed_cpu_kernel
from serve_app.models.matmul import Int4CpuKernel, Int8CpuKernel, int_kernel
from serve_app.models.quantized import QuantizedWeight, quantize

SHAPES = [(48, 64), (112, 160), (16, 96 * 32), (272, 96)]
"""Groups: fewer than are scaled together, a rest of one, more than fit in one go (tiles). The last
has blocks enough to be taken by two (dot products), and one over."""


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def made(
    bits: int, shape: tuple[int, int], *, halves: bool = True, has_wide_output: bool = True
) -> tuple[QuantizedWeight, PackedCpuKernel]:
    """A random weight, with scales that float16 holds where `halves`, and its kernel."""
    weight = quantize(torch.randn(shape), bits)
    if not halves:
        scales, offsets = weight.scales * 1.0003, weight.offsets * 1.0003
        weight = QuantizedWeight(bits, weight.codes, scales, offsets)
    kernel = packed_cpu_kernel(weight, has_wide_output=has_wide_output)
    if kernel is None:
        pytest.skip("no g++ here, or another OpenMP than GCC's")
    return weight, kernel


def exact(x: torch.Tensor, weight: QuantizedWeight) -> torch.Tensor:
    return x.double() @ weight.dequantize(torch.float32).double().T


def error(y: torch.Tensor, expected: torch.Tensor) -> float:
    return float((y.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_are_those_of_float32(
    bits: int, shape: tuple[int, int], halves: bool, dtype: torch.dtype
) -> None:
    weight, kernel = made(bits, shape, halves=halves)
    for num_rows in (1, 2, 7, 33, 131):
        x = torch.randn(num_rows, shape[1]).to(dtype)
        y = kernel(x)
        assert y.dtype is torch.float32
        assert error(y, exact(x, weight)) < 5e-7, num_rows


def test_a_bias_is_added_and_the_inputs_type_is_kept() -> None:
    weight, _ = made(4, (48, 64))
    bias = torch.randn(48)
    for dtype, bound in ((torch.float32, 1e-6), (torch.bfloat16, 4e-3), (torch.float16, 1e-3)):
        kernel = packed_cpu_kernel(weight, bias)
        assert kernel is not None
        for num_rows in (3, 40):
            x = torch.randn(num_rows, 64).to(dtype)
            y = kernel(x)
            assert y.dtype is dtype
            assert error(y, exact(x, weight) + bias) < bound


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_many_rows_meet_weights_as_exact_as_bfloat16(bits: int, shape: tuple[int, int]) -> None:
    weight, kernel = made(bits, shape, has_wide_output=False)
    for num_rows in (33, 47, 64, 100, 515):
        x = torch.randn(num_rows, shape[1]).bfloat16()
        assert error(kernel(x), exact(x, weight)) < 4e-3, num_rows


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_rows_bits_depend_neither_on_the_batch_nor_on_the_threads(
    bits: int, shape: tuple[int, int]
) -> None:
    kernel = made(bits, shape, has_wide_output=False)[1].row_invariant()
    x = torch.randn(150, shape[1]).bfloat16()
    together = kernel(x)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for start, end in ((0, 1), (3, 5), (7, 10), (0, 4), (10, 15), (2, 19), (0, 31), (20, 149)):
            assert torch.equal(kernel(x[start:end]), together[start:end]), (start, end)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("means", Means)
def test_whatever_multiplies_is_exact_and_gives_a_row_its_own_bits(
    bits: int, shape: tuple[int, int], means: Means
) -> None:
    """A processor with tiles has dot products too, and each has vectors."""
    weight, kernel = made(bits, shape)
    if means > kernel.means:
        pytest.skip(f"this processor has no {means.name.lower()}")
    kernel.means = means
    x = torch.randn(150, shape[1]).bfloat16()
    together = kernel(x)
    assert error(together, exact(x, weight)) < 5e-7
    for start, end in ((0, 1), (3, 5), (0, 31), (20, 149)):
        assert torch.equal(kernel(x[start:end]), together[start:end]), (start, end)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("group_size", "halves"), [(64, True), (128, True), (128, False)])
def test_scales_that_groups_share_stand_once_and_give_the_same_bits(
    bits: int, group_size: int, halves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = quantize(torch.randn(48, 640), bits, group_size)
    if not halves:
        weight = QuantizedWeight(bits, weight.codes, weight.scales * 1.0003, weight.offsets)
    shared = packed_cpu_kernel(weight)
    monkeypatch.setattr(QuantizedWeight, "shared_groups", lambda weight: 1)
    each = packed_cpu_kernel(weight)
    if shared is None or each is None:
        pytest.skip("no g++ here, or another OpenMP than GCC's")
    num_scales = 2 if (weight.offsets != 0).any() else 1
    scale_bytes = num_scales * 48 * 640 // 32 * (2 if halves and bits == 4 else 4)
    assert each.nbytes - shared.nbytes == scale_bytes - scale_bytes * 32 // group_size
    for num_rows in (1, 2, 7, 40, 131):
        x = torch.randn(num_rows, 640).bfloat16()
        assert torch.equal(shared(x), each(x)), num_rows


def test_rows_that_lie_apart_are_read_right() -> None:
    weight, kernel = made(4, (48, 64))
    x = torch.randn(5, 130).bfloat16()[:, 1:65]
    assert error(kernel(x), exact(x, weight)) < 5e-7
    assert kernel(x[:0]).shape == (0, 48)


def test_codes_and_scales_take_what_the_file_has() -> None:
    weight, kernel = made(4, (48, 64))
    assert kernel.nbytes == 48 * 64 // 2 + 2 * 2 * 48 * 2
    symmetric = QuantizedWeight(
        8,
        torch.randint(-128, 128, (48, 64), dtype=torch.int8),
        weight.scales,
        torch.zeros_like(weight.offsets),
    )
    kernel = packed_cpu_kernel(symmetric)
    assert kernel is not None
    assert kernel.nbytes == 48 * 64 + 2 * 48 * 2


def test_other_shapes_and_the_switch_leave_it_to_aten(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert packed_cpu_kernel(quantize(torch.randn(20, 64), 4)) is None
    monkeypatch.setattr(cpu_packed, "disabled_kernels", lambda: {"cpu_packed"})
    for bits, kind in ((4, Int4CpuKernel), (8, Int8CpuKernel)):
        assert isinstance(int_kernel(quantize(torch.randn(48, 64), bits), cpu, None), kind)


def test_without_a_library_there_is_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_packed, "_library", lambda: None)
    assert packed_cpu_kernel(quantize(torch.randn(48, 64), 4)) is None
