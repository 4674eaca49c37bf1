import pytest
import torch

from serve_app.models.kernels.gemv import rows_per_program, skinny_linear


@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(("size", "depth"), [(37, 64), (6, 1032), (8, 2048)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_kernel_is_a_product(dtype, kernel_device, num_rows, size, depth, has_bias, assert_near):
    hidden = torch.randn(num_rows, depth, device=kernel_device).to(dtype)
    weight = torch.randn(size, depth, device=kernel_device).to(dtype)
    bias = torch.randn(size, device=kernel_device).to(dtype) if has_bias else None
    expected = hidden.double() @ weight.double().T + (0 if bias is None else bias.double())
    assert_near(skinny_linear(hidden, weight, bias), expected)


def test_without_a_kernel_it_is_f_linear(monkeypatch):
    monkeypatch.setattr("serve_app.models.kernels.gemv.has_kernel", lambda *_: False)
    hidden, weight = torch.randn(2, 16), torch.randn(4, 16)
    assert torch.equal(skinny_linear(hidden, weight), hidden @ weight.T)


def test_small_matrices_take_fewer_rows_a_program():
    assert rows_per_program(18944, 132, 8) == 8
    assert rows_per_program(18944, 132, 4) == 4
    assert rows_per_program(1500, 132, 4) == 2
    assert rows_per_program(512, 132, 4) == 1
