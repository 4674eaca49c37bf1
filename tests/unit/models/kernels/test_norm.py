import pytest
import torch

from serve_app.models.kernels.norm import rms_norm, rms_norm_torch


def _inputs(dtype, device="cpu", size=96, residual_dtype=torch.float32):
    hidden, residual = (torch.randn(5, size, device=device) for _ in range(2))
    weight = torch.rand(size, device=device).to(dtype) + 0.5
    return hidden.to(dtype), residual.to(residual_dtype), weight


def test_twin_is_torchs_rms_norm(dtype, assert_near):
    hidden, residual, weight = _inputs(dtype)
    normed, summed = rms_norm_torch(hidden, residual, weight, 1e-5)
    assert normed.dtype is dtype
    assert torch.equal(summed, hidden.float() + residual)
    expected = torch.nn.functional.rms_norm(summed.double(), (96,), weight.double(), 1e-5)
    assert_near(normed, expected)


def test_the_residual_keeps_what_bfloat16_would_round_away():
    hidden, residual = torch.full((1, 8), 2**-10, dtype=torch.bfloat16), torch.ones(1, 8)
    _, summed = rms_norm(hidden, residual, torch.ones(8, dtype=torch.bfloat16), 1e-6)
    assert torch.equal(summed, torch.full((1, 8), 1 + 2**-10))


@pytest.mark.parametrize("size", [64, 96, 100])
@pytest.mark.parametrize("has_residual", [True, False])
@pytest.mark.parametrize("hidden_dtype", [None, torch.float32], ids=["own", "wide"])
def test_kernel_is_the_twin(dtype, kernel_device, size, has_residual, hidden_dtype, assert_near):
    hidden, residual, weight = _inputs(dtype, kernel_device, size)
    hidden = hidden.to(hidden_dtype or dtype)
    residual = residual if has_residual else None
    normed, summed = rms_norm(hidden, residual, weight, 1e-6)
    expected_normed, expected_summed = rms_norm_torch(hidden, residual, weight, 1e-6)
    assert summed.dtype is expected_summed.dtype is torch.float32
    assert normed.dtype is expected_normed.dtype is dtype
    assert torch.equal(summed, expected_summed)
    assert_near(normed, expected_normed)


def test_kernel_reads_strided_rows(kernel_device, assert_near):
    wide = torch.randn(4, 128, device=kernel_device)
    weight = torch.ones(64, device=kernel_device)
    normed, _ = rms_norm(wide[:, :64], None, weight, 1e-6)
    assert_near(normed, rms_norm_torch(wide[:, :64], None, weight, 1e-6)[0])
