import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from serve_app.models.kernels.int4_gemv import (
    arrange_int4,
    dequantize_int4,
    int4_gemv,
    int4_linear,
    int4_matmul,
    matmul_splits,
)
from serve_app.models.kernels.int4_mma import choose_shape
from serve_app.models.kernels.int4_pack import (
    dequantize_int4_torch,
    int4_linear_torch,
    pack_int4,
    tile_int4,
    unpack_int4,
    untile_int4,
)

LINEAR_TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}


def _quantized(size, depth, group_size, *, has_zeros=True):
    quantized = torch.randint(0, 16, (size, depth), dtype=torch.uint8)
    scales = (torch.rand(depth // group_size, size) * 0.02 + 0.001).half()
    zeros = (torch.rand(depth // group_size, size) * 15).half() if has_zeros else None
    return quantized, scales, zeros


def _dense(quantized, scales, zeros, group_size):
    zeros = torch.full_like(scales, 8.0) if zeros is None else zeros
    wide_scales = scales.double().T.repeat_interleave(group_size, dim=1)
    wide_zeros = zeros.double().T.repeat_interleave(group_size, dim=1)
    return (quantized.double() - wide_zeros) * wide_scales


@given(
    seed=st.integers(0, 2**31), size=st.integers(1, 5), groups=st.integers(1, 3),
    group_size=st.sampled_from([32, 64, 128]),
)  # fmt: skip
def test_packing_loses_nothing(seed, size, groups, group_size):
    torch.manual_seed(seed)
    quantized, scales, zeros = _quantized(size, groups * group_size, group_size)
    weight = pack_int4(quantized, scales, zeros)
    assert weight.words.shape == (size, groups * group_size // 8)
    for got, put in zip(unpack_int4(weight), (quantized, scales, zeros), strict=True):
        assert torch.equal(got, put)


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_tiling_moves_runs_and_loses_nothing(group_size):
    weight = pack_int4(*_quantized(48, 384, group_size))
    tiled = tile_int4(weight)
    row, run = 21, 6  # row 5 of the second rows' tile, run 2 of its second tile
    tile = 1 * 3 + 1
    place = tile * 256 + 5 * 16 + 2 * 4
    codes = unpack_int4(weight)[0][row, run * 32 : run * 32 + 32].long()
    for word in range(4):  # nibbles i and i + 4: neighbouring columns
        own = codes[2 * word :: 8].tolist() + codes[2 * word + 1 :: 8].tolist()
        held = int(tiled.words.flatten()[place + word]) & 0xFFFFFFFF
        assert [held >> (4 * i) & 15 for i in range(8)] == own
    for got, put in zip(unpack_int4(tiled), unpack_int4(weight), strict=True):
        assert torch.equal(got, put)
    again = untile_int4(tiled)
    assert torch.equal(again.words, weight.words)
    assert torch.equal(again.scale_zero, weight.scale_zero)


@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 5, 17, 130])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_tiled_weight_gives_the_twins_product(
    dtype, kernel_device, group_size, num_rows, assert_near
):
    weight = tile_int4(pack_int4(*_quantized(80, 640, group_size)).to(kernel_device))
    hidden = torch.randn(num_rows, 640, device=kernel_device).to(dtype)
    bias = torch.randn(80, device=kernel_device).to(dtype)
    expected = hidden.double() @ dequantize_int4_torch(weight, torch.float64).T + bias.double()
    assert_near(int4_linear(hidden, weight, bias), expected, LINEAR_TOLERANCE[dtype])
    assert_near(dequantize_int4(weight, dtype), dequantize_int4_torch(weight, dtype))


def test_weights_that_are_no_whole_tiles_stay(kernel_device):
    for size, depth in ((37, 384), (48, 96)):
        weight = pack_int4(*_quantized(size, depth, 32)).to(kernel_device)
        assert arrange_int4(weight) is weight


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("has_zeros", [True, False])
def test_twin_multiplies_by_the_dense_weight(dtype, group_size, has_zeros, assert_near):
    parts = _quantized(24, 256, group_size, has_zeros=has_zeros)
    hidden, bias = torch.randn(3, 256).to(dtype), torch.randn(24).to(dtype)
    expected = hidden.double() @ _dense(*parts, group_size).T + bias.double()
    assert_near(int4_linear_torch(hidden, pack_int4(*parts), bias), expected, 1.2e-2)


def test_wrong_shapes_are_refused():
    quantized, scales, zeros = _quantized(4, 128, 32)
    with pytest.raises(ValueError, match="scales must be"):
        pack_int4(quantized, scales[:, :3])
    with pytest.raises(ValueError, match="group size must be one of"):
        pack_int4(quantized[:, :32], scales)
    with pytest.raises(ValueError, match="zeros must be"):
        pack_int4(quantized, scales, zeros[:2])
    with pytest.raises(ValueError, match="fit float16"):
        pack_int4(quantized, scales.float() * 1e9)


@pytest.mark.parametrize("product", [int4_gemv, int4_matmul, int4_linear])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("num_rows", [1, 2, 3, 4])
def test_kernels_are_the_twin(dtype, kernel_device, product, group_size, num_rows, assert_near):
    weight = pack_int4(*_quantized(37, 384, group_size)).to(kernel_device)
    hidden = torch.randn(num_rows, 384, device=kernel_device).to(dtype)
    bias = torch.randn(37, device=kernel_device).to(dtype)
    expected = hidden.double() @ dequantize_int4_torch(weight, torch.float64).T + bias.double()
    assert_near(product(hidden, weight, bias), expected, LINEAR_TOLERANCE[dtype])


@pytest.mark.parametrize("num_rows", [5, 17, 130])
def test_more_rows_go_to_the_matrix_kernel_and_the_dense_weight(
    dtype, kernel_device, num_rows, assert_near
):
    weight = pack_int4(*_quantized(70, 1024, 128)).to(kernel_device)
    hidden = torch.randn(num_rows, 1024, device=kernel_device).to(dtype)
    expected = hidden.double() @ dequantize_int4_torch(weight, torch.float64).T
    assert_near(int4_linear(hidden, weight), expected, LINEAR_TOLERANCE[dtype])


def test_depth_of_several_steps(kernel_device, assert_near):
    weight = pack_int4(*_quantized(5, 4096 + 128, 32)).to(kernel_device)
    hidden = torch.randn(1, 4096 + 128, device=kernel_device)
    expected = hidden.double() @ dequantize_int4_torch(weight, torch.float64).T
    assert_near(int4_gemv(hidden, weight), expected, 1e-4)


def test_one_large_activation_leaves_the_others_precise(kernel_device, assert_near):
    weight = pack_int4(*_quantized(16, 256, 64)).to(kernel_device)
    hidden = torch.randn(1, 256, device=kernel_device)
    hidden[0, 5] = 3000.0
    expected = hidden.double() @ dequantize_int4_torch(weight, torch.float64).T
    assert_near(int4_gemv(hidden, weight), expected, 1e-4)


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_dequantize_kernel_is_the_twin(dtype, kernel_device, group_size, assert_near):
    weight = pack_int4(*_quantized(6, 2048 + 128, group_size)).to(kernel_device)
    assert_near(dequantize_int4(weight, dtype), dequantize_int4_torch(weight, dtype))


def test_few_programs_of_the_tensor_cores_take_more_warps():
    assert choose_shape(1, 37888, 3584, 132) == (2, 4, 1)
    assert choose_shape(1, 4608, 3584, 132) == (1, 8, 1)
    assert choose_shape(1, 3584, 3584, 132) == (2, 8, 1)
    assert choose_shape(1, 3584, 18944, 132) == (2, 16, 1)
    assert choose_shape(4, 4608, 3584, 132) == (2, 4, 2)
    assert choose_shape(4, 3584, 3584, 132) == (2, 8, 2)


def test_splits_keep_steps_enough():
    assert matmul_splits(2000, 28, 132) == 1
    assert matmul_splits(56, 148, 132) == 8
    assert matmul_splits(56, 7, 132) == 1
