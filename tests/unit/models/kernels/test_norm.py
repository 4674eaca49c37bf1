import pytest
import torch

from serve_app.models.kernels.norm import rms_norm, rms_norm_torch


def _inputs(dtype, device="cpu", size=96):
    hidden, residual = (torch.randn(5, size, device=device).to(dtype) for _ in range(2))
    return hidden, residual, torch.rand(size, device=device).to(dtype) + 0.5


def test_twin_is_torchs_rms_norm(dtype, assert_near):
    hidden, residual, weight = _inputs(dtype)
    normed, summed = rms_norm_torch(hidden, residual, weight, 1e-5)
    assert torch.equal(summed, hidden + residual)
    expected = torch.nn.functional.rms_norm(summed.double(), (96,), weight.double(), 1e-5)
    assert_near(normed, expected)


@pytest.mark.parametrize("size", [64, 96, 100])
@pytest.mark.parametrize("has_residual", [True, False])
def test_kernel_is_the_twin(dtype, kernel_device, size, has_residual, assert_near):
    hidden, residual, weight = _inputs(dtype, kernel_device, size)
    residual = residual if has_residual else None
    normed, summed = rms_norm(hidden, residual, weight, 1e-6)
    expected_normed, expected_summed = rms_norm_torch(hidden, residual, weight, 1e-6)
    assert torch.equal(summed, expected_summed)
    assert_near(normed, expected_normed)


def test_kernel_reads_strided_rows(kernel_device, assert_near):
    wide = torch.randn(4, 128, device=kernel_device)
    weight = torch.ones(64, device=kernel_device)
    normed, _ = rms_norm(wide[:, :64], None, weight, 1e-6)
    assert_near(normed, rms_norm_torch(wide[:, :64], None, weight, 1e-6)[0])
