"""The arithmetic of an evaluation, against the formulas written out."""

from __future__ import annotations

import math

import pytest
import torch

from serve_app.core.errors import ConfigError
from serve_app.quantize.evaluate import (
    Comparison,
    Measured,
    ModelFigures,
    Sums,
    Thresholds,
    compare,
    score,
)


class FakeScorer:
    """Logits by table: the row of the last token."""

    engine = "native"
    dtype = "float32"
    max_position = 64
    weights_bytes = 10

    def __init__(self, table: torch.Tensor) -> None:
        self.table = table
        self.vocab_size = table.shape[1]

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        return self.table[ids]

    def decode_tokens_per_s(self, ids: torch.Tensor, num_tokens: int) -> float:
        return float(num_tokens)


def _figures(perplexity: float, file_bytes: int, rate: float) -> ModelFigures:
    return ModelFigures("m", "native", "float32", perplexity, file_bytes, 1, 1.0, rate)


def test_sums_are_the_formulas():
    generator = torch.Generator().manual_seed(0)
    own, other = (torch.randn(6, 5, generator=generator) for _ in range(2))
    targets = torch.tensor([0, 4, 2, 1, 3, 0])
    sums = Sums()
    sums.add(own[:4], targets[:4], other[:4])
    sums.add(own[4:], targets[4:], other[4:])
    q, p = own.double().softmax(-1), other.double().softmax(-1)
    nll = -sum(math.log(q[t, targets[t]]) for t in range(6))
    kl = sum(float(p[t, v] * (p[t, v] / q[t, v]).log()) for t in range(6) for v in range(5))
    assert sums.perplexity == pytest.approx(math.exp(nll / 6), rel=1e-5)
    assert sums.kl == pytest.approx(kl, rel=1e-4)
    assert sums.matches == int((own.argmax(-1) == other.argmax(-1)).sum())


def test_a_model_against_itself_loses_nothing():
    scorer = FakeScorer(torch.randn(8, 8, generator=torch.Generator().manual_seed(1)))
    ids = torch.randint(8, (3, 10), generator=torch.Generator().manual_seed(2))
    seen: list[tuple[int, int]] = []
    model, teacher = Measured(scorer, "a", 50), Measured(scorer, "b", 100)
    sums = score(model, teacher, ids, lambda done, total: seen.append((done, total)))
    assert sums.num_tokens == 27
    assert sums.matches == 27
    assert sums.kl == pytest.approx(0, abs=1e-6)
    assert sums.perplexity == pytest.approx(sums.teacher_perplexity)
    assert seen[-1] == (3, 3)
    assert model.num_scored == 30


def test_a_padded_vocabulary_is_compared_where_both_have_tokens():
    own, other = torch.zeros(1, 4), torch.zeros(1, 6)
    sums = Sums()
    sums.add(own, torch.tensor([2]), other)
    assert sums.teacher_perplexity == pytest.approx(4)
    assert sums.kl == pytest.approx(0, abs=1e-7)


def test_logits_that_are_not_finite_end_the_evaluation():
    bad = torch.tensor([[0.0, float("nan")]])
    with pytest.raises(ConfigError, match="the model gives logits that are not finite"):
        Sums().add(bad, torch.tensor([0]), None)
    with pytest.raises(ConfigError, match="the teacher gives"):
        Sums().add(torch.zeros(1, 2), torch.tensor([0]), bad)


def test_thresholds_name_what_does_not_hold():
    comparison = Comparison(0.1, 0.96, 0.06, 0.4, 1.5)
    assert Thresholds().failures(comparison) == [
        "top-1 agreement 96.00% is 1.00 points below 97.00% (--min-top1)"
    ]
    assert not Thresholds(min_top1=0.96).failures(comparison)
    every = Thresholds(None, 0.05, 0.05).failures(comparison)
    assert [line.split()[0] for line in every] == ["perplexity", "KL"]


def test_comparison_is_ratios():
    sums = Sums(num_tokens=10, kl=2.0, matches=9)
    found = compare(sums, _figures(21.0, 40, 30.0), _figures(20.0, 100, 20.0))
    assert found == Comparison(0.2, 0.9, pytest.approx(0.05), 0.4, 1.5)
