from __future__ import annotations

import pytest
import torch

from serve_app.models.kernels._triton import has_kernel
from serve_app.models.kernels.cpu_packed import PackedCpuKernel
from serve_app.models.matmul import (
    DenseKernel,
    FixedTiles,
    Int4GroupKernel,
    int_kernel,
    prepacked_kernel,
    row_invariant,
)
from serve_app.models.quantized import quantize


@pytest.fixture(params=[False, True], ids=["compiled", "aten"])
def each_kernel(request, monkeypatch):
    """Kernels of this machine, and as on one without g++."""
    if request.param:
        monkeypatch.setattr("serve_app.models.kernels.cpu_packed._library", lambda: None)


ROWS = [*range(1, 10), 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 72]


def make(bits, num_rows=48, num_columns=128, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return quantize(torch.randn(num_rows, num_columns, generator=generator), bits)


def inputs(num_rows, num_columns, device, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(num_rows, num_columns, generator=generator).to(device, dtype)


@pytest.mark.usefixtures("each_kernel")
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_packed_kernels_multiply_as_exactly_as_dense_bfloat16(bits, with_bias, dtype, device):
    weight = make(bits)
    bias = torch.randn(48) if with_bias else None
    kernel = int_kernel(weight, torch.device(device), bias)
    if kernel is None:
        assert device != "cpu"
        pytest.skip(f"no {bits}-bit kernel on {device}")
    x = inputs(5, 128, device, dtype)
    exact = x.cpu().double() @ weight.dequantize(torch.float32).double().T
    exact = exact if bias is None else exact + bias
    y = kernel(x)
    assert y.dtype == dtype
    assert y.device.type == device
    assert (y.cpu().double() - exact).norm() / exact.norm() < 5e-3


@pytest.mark.parametrize(
    ("made", "num_columns", "found"), [(32, 128, 32), (64, 128, 64), (128, 256, 128), (64, 192, 64)]
)
def test_a_cards_kernel_reads_one_scale_per_group_of_the_file(made, num_columns, found):
    dense = torch.randn(16, num_columns, generator=torch.Generator().manual_seed(0))
    weight = quantize(dense, 4, made)
    assert weight.shared_groups() * 32 == found
    kernel = Int4GroupKernel(weight, torch.device("cpu"))
    assert kernel.nbytes == 16 * num_columns // 2 + 4 * 16 * num_columns // found
    x = torch.randn(3, num_columns)
    expected = x @ weight.dequantize(torch.float32).T
    assert (kernel(x) - expected).norm() / expected.norm() < 2e-3


def test_sizes_that_no_kernel_takes_are_left_to_dense(device):
    kernel = int_kernel(make(4, num_rows=20), torch.device(device), None)
    takes_any = device != "cpu" and has_kernel("int4", torch.empty(0, device=device))
    assert (kernel is not None) == takes_any


@pytest.mark.usefixtures("each_kernel")
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(48, 128), (576, 576), (1000 // 16 * 16, 1536)])
def test_a_row_of_a_packed_cpu_kernel_is_the_same_in_any_batch(bits, shape):
    kernel = int_kernel(make(bits, *shape), torch.device("cpu"), None)
    if isinstance(kernel, PackedCpuKernel):
        kernel = kernel.row_invariant()
    x = inputs(72, shape[1], "cpu")
    alone = torch.cat([kernel(row) for row in x.split(1)])
    for num_rows in ROWS:
        assert torch.equal(kernel(x[:num_rows]), alone[:num_rows]), num_rows
        assert torch.equal(kernel(x[-num_rows:]), alone[-num_rows:]), num_rows


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(48, 64), (576, 576), (100, 96), (1000, 1536)])
def test_a_row_of_fixed_tiles_is_the_same_in_any_batch(dtype, shape, device):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator).to(device, dtype)
    kernel = row_invariant(DenseKernel(weight), shape[1], torch.device(device), dtype)
    x = inputs(72, shape[1], device, dtype)
    alone = torch.cat([kernel(row) for row in x.split(1)])
    torch.testing.assert_close(alone, DenseKernel(weight)(x), rtol=0.02, atol=0.05)
    for num_rows in ROWS:
        assert torch.equal(kernel(x[:num_rows]), alone[:num_rows]), num_rows
        assert torch.equal(kernel(x[-num_rows:]), alone[-num_rows:]), num_rows


@pytest.mark.parametrize("shape", [(48, 64), (576, 576), (1000, 1536)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_prepacked_weight_gives_the_dense_product_and_invariant_rows(shape, with_bias):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator).to(torch.bfloat16)
    bias = torch.randn(shape[0], generator=generator) if with_bias else None
    kernel = prepacked_kernel(weight, bias)
    if kernel is None:
        pytest.skip("this CPU multiplies bfloat16 slowly, or the build has no oneDNN")
    x = inputs(72, shape[1], "cpu")
    dense = DenseKernel(weight, bias)
    torch.testing.assert_close(kernel(x), dense(x), rtol=0.02, atol=0.3)
    assert kernel(x.float()).dtype == torch.float32
    tiles = row_invariant(kernel, shape[1], torch.device("cpu"), torch.bfloat16)
    alone = torch.cat([tiles(row) for row in x.split(1)])
    for num_rows in ROWS:
        assert torch.equal(tiles(x[:num_rows]), alone[:num_rows]), num_rows
        assert torch.equal(tiles(x[-num_rows:]), alone[-num_rows:]), num_rows


def test_float32_weights_are_not_prepacked():
    assert prepacked_kernel(torch.randn(16, 64), None) is None


def test_dense_kernel_keeps_the_activations_type():
    kernel = DenseKernel(torch.randn(8, 16), torch.randn(8))
    assert kernel(torch.randn(3, 16, dtype=torch.bfloat16)).dtype == torch.bfloat16


class _CutsTiles:
    """A kernel whose rows from the ninth on go through other code, as between threads."""

    nbytes = 0

    def __init__(self, weight):
        self.weight = weight
        self.rows = []

    def __call__(self, x):
        self.rows.append(x.shape[0])
        return torch.cat((x[:8] @ self.weight, x[8:] @ self.weight * (1 + 1e-6)))


def test_a_tile_shrinks_until_a_rows_place_makes_no_difference():
    kernel = _CutsTiles(torch.eye(16, 8))  # exact for any number of rows
    tiles = row_invariant(kernel, 16, torch.device("cpu"), torch.float32)
    assert tiles.tile_rows == 8
    kernel.rows.clear()
    assert tiles(torch.randn(20, 16)).shape == (20, 8)
    assert kernel.rows == [8, 8, 4]


def test_the_largest_tile_is_taken_where_it_may_be():
    class Exact:
        nbytes = 0

        def __call__(self, x):
            return x * 2

    assert row_invariant(Exact(), 16, torch.device("cpu"), torch.float32).tile_rows == 32
    assert FixedTiles(Exact())(torch.ones(40, 16)).shape == (40, 16)


class _ByNumber:
    """A kernel that takes other code for an odd number of rows."""

    nbytes = 0

    def __init__(self):
        self.rows = []

    def __call__(self, x):
        self.rows.append(x.shape[0])
        return x * (2 if x.shape[0] % 2 == 0 else 2.5)


def test_the_last_tile_is_padded_only_where_the_number_of_rows_shows():
    assert _rows_of_calls(_ByNumber()) == [32, 32]
    assert _rows_of_calls(_Counts()) == [32, 9]


def _rows_of_calls(kernel):
    tiles = row_invariant(kernel, 16, torch.device("cpu"), torch.float32)
    kernel.rows.clear()
    assert tiles(torch.ones(41, 16)).shape == (41, 16)
    return kernel.rows


class _Counts:
    """A kernel that treats all rows alike, and counts them."""

    nbytes = 0

    def __init__(self):
        self.rows = []

    def __call__(self, x):
        self.rows.append(x.shape[0])
        return x * 2


def test_a_difference_in_one_of_five_thousand_outputs_is_found():
    """As where a single row goes through other code, and rounding to bfloat16 hides the most."""

    class Odd(DenseKernel):
        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            y = x[:, :1] * self.weight[:, 0]  # no sums, which a library may order as it likes
            if len(x) == 1 and (column := int(x[0, 0].view(torch.int16)) % 5000) < y.shape[1]:
                y[0, column] *= 1.01
            return y

    kernel = Odd(torch.randn(1000, 64).bfloat16())
    assert all(
        row_invariant(kernel, 64, torch.device("cpu"), torch.bfloat16).pads for _ in range(5)
    )
