import pytest
import torch

from serve_app.models.kernels.activation import silu_and_mul, silu_and_mul_torch


def test_twin_gates_the_second_half(dtype, assert_near):
    packed = torch.randn(3, 20).to(dtype)
    gate, up = packed[:, :10].double(), packed[:, 10:].double()
    assert_near(silu_and_mul_torch(packed), gate * torch.sigmoid(gate) * up)


@pytest.mark.parametrize(("rows", "size"), [(1, 40), (3, 1030), (2, 64)])
def test_kernel_is_the_twin(dtype, kernel_device, rows, size, assert_near):
    packed = (3 * torch.randn(rows, 2 * size, device=kernel_device)).to(dtype)
    assert_near(silu_and_mul(packed), silu_and_mul_torch(packed))


def test_no_rows_give_no_rows(kernel_device):
    assert silu_and_mul(torch.empty(0, 8, device=kernel_device)).shape == (0, 4)
