"""Products whose float32 sums are kept: on cards, and what stands in for them on a CPU."""

from __future__ import annotations

import pytest
import torch

from serve_app.models.head import make_dense_head
from serve_app.models.linear import LinearPolicy, RowParallelLinear, make_linear
from serve_app.models.wide import wide_kernel


def _random(*shape: int, device: str = "cpu") -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(device, torch.bfloat16)


@pytest.mark.parametrize("num_rows", [1, 2, 7, 64])
@pytest.mark.parametrize("has_bias", [True, False])
def test_the_product_is_not_rounded(device, num_rows, has_bias):
    weight, x = _random(96, 64, device=device), _random(num_rows, 64, device=device)
    bias = _random(96, device=device) if has_bias else None
    kernel = wide_kernel(weight, bias)
    if device == "cpu":
        assert kernel is None
        return
    assert kernel is not None
    y = kernel(x)
    expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    assert y.dtype is torch.float32
    assert (y - expected).abs().max() < 1e-4


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_a_dense_heads_best_logits_are_exact(device, batch_invariant):
    weight, hidden = _random(512, 64, device=device), _random(5, 64, device=device)
    policy = LinearPolicy(
        torch.device(device), torch.bfloat16, torch.bfloat16, batch_invariant=batch_invariant
    )
    head = make_dense_head(weight, weight, policy)
    logits = head(hidden, batch_invariant)
    expected = hidden.double() @ weight.double().T
    assert logits.dtype is torch.float32
    best = expected.argmax(-1, keepdim=True)
    assert (logits.gather(1, best) - expected.gather(1, best)).abs().max() < 1e-4
    if batch_invariant:
        for row in range(5):
            assert torch.equal(head(hidden[row : row + 1], True)[0], logits[row])


@pytest.mark.parametrize("num_rows", [1, 40])
def test_ranks_add_in_float32_and_round_the_sum(device, num_rows):
    weight, x = _random(64, 128, device=device), _random(num_rows, 128, device=device)
    policy = LinearPolicy(torch.device(device), torch.bfloat16, torch.bfloat16)
    halves = [
        make_linear([weight[:, part]], [None], policy) for part in (slice(64), slice(64, 128))
    ]
    parts: list[torch.Tensor] = []
    RowParallelLinear(halves[1], parts.append)(x[:, 64:])
    assert parts[0].dtype is torch.float32

    def add(part: torch.Tensor) -> None:
        parts.append(part.clone())
        part += parts[0]

    y = RowParallelLinear(halves[0], add)(x[:, :64])
    assert y.dtype is torch.bfloat16
    assert torch.equal(y, (parts[0] + parts[1]).bfloat16())
    whole = make_linear([weight], [None], policy)(x)
    is_kept = wide_kernel(weight) is not None
    assert (y == whole).float().mean() > (0.98 if is_kept else 0.5)
    assert (y - whole).abs().max() <= 2**-7 * whole.abs().max()
