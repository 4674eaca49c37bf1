"""How good a model is, alone and against its teacher: perplexity, divergence, agreement, cost.

Over the T predicted tokens of the text's windows, each window by itself, with p the teacher's and q
the model's distribution::

    perplexity   exp(- Σ log q(token) / T)
    KL           Σ_t Σ_v p log(p / q) / T, in nats
    top-1        share of t at which both put the same token first, the teacher's text given
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F

from serve_app.core.errors import ConfigError
from serve_app.quantize.scoring import Scorer

OnWindow = Callable[[int, int], None]


@dataclass(slots=True)
class Sums:
    """Sums over predicted tokens: negative log-likelihoods and divergence in nats, matches."""

    num_tokens: int = 0
    nll: float = 0.0
    teacher_nll: float = 0.0
    kl: float = 0.0
    matches: int = 0

    def add(
        self, logits: torch.Tensor, targets: torch.Tensor, teacher: torch.Tensor | None
    ) -> None:
        """Count rows: float32 [T, vocab], int64 [T], and the teacher's [T, vocab] if there is one.

        Where one vocabulary is padded further than the other, what both have is compared. Raises
        ConfigError on values that are not finite: no average would show them.
        """
        for name, values in (("the model", logits), ("the teacher", teacher)):
            if values is not None and not bool(torch.isfinite(values).all()):
                raise ConfigError(f"model: {name} gives logits that are not finite", param="model")
        width = min(logits.shape[1], teacher.shape[1] if teacher is not None else logits.shape[1])
        own = F.log_softmax(logits[:, :width], dim=-1)
        self.num_tokens += targets.shape[0]
        self.nll -= float(own.gather(1, targets[:, None]).double().sum())
        if teacher is None:
            return
        other = F.log_softmax(teacher[:, :width], dim=-1)
        self.teacher_nll -= float(other.gather(1, targets[:, None]).double().sum())
        self.kl += float(F.kl_div(own, other, reduction="none", log_target=True).double().sum())
        self.matches += int((own.argmax(-1) == other.argmax(-1)).sum())

    @property
    def perplexity(self) -> float:
        """The model's."""
        return math.exp(self.nll / self.num_tokens)

    @property
    def teacher_perplexity(self) -> float:
        """The teacher's on the same tokens."""
        return math.exp(self.teacher_nll / self.num_tokens)


@dataclass(frozen=True, slots=True)
class ModelFigures:
    """What one model costs: bytes of its files, bytes of its weights in memory, tokens/s."""

    name: str
    engine: str
    dtype: str
    perplexity: float
    file_bytes: int
    weights_bytes: int
    prefill_tokens_per_s: float
    decode_tokens_per_s: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """The model against its teacher. `kl` in nats per token; shares of 1."""

    kl: float
    top1: float
    perplexity_increase: float
    size_share: float
    decode_speedup: float


@dataclass(frozen=True, slots=True)
class Thresholds:
    """What must hold; None: not asked for."""

    min_top1: float | None = 0.97
    max_perplexity_increase: float | None = None
    max_kl: float | None = None

    def failures(self, comparison: Comparison) -> list[str]:
        """One line for each that does not hold: by how much, and the option that sets it."""
        found = []
        least = self.min_top1
        if least is not None and comparison.top1 < least:
            found.append(
                f"top-1 agreement {comparison.top1:.2%} is {100 * (least - comparison.top1):.2f}"
                f" points below {least:.2%} (--min-top1)"
            )
        limit = self.max_perplexity_increase
        if limit is not None and comparison.perplexity_increase > limit:
            over = 100 * (comparison.perplexity_increase - limit)
            found.append(
                f"perplexity is {comparison.perplexity_increase:+.2%}, {over:.2f} points over"
                f" {limit:+.2%} (--max-perplexity-increase)"
            )
        if self.max_kl is not None and comparison.kl > self.max_kl:
            found.append(
                f"KL divergence {comparison.kl:.4f} is {comparison.kl - self.max_kl:.4f} nats over"
                f" {self.max_kl:.4f} (--max-kl)"
            )
        return found


@dataclass(slots=True)
class Report:
    """Everything of one evaluation; `teacher` and `comparison` where there was a teacher."""

    text: str
    num_tokens: int
    context: int
    model: ModelFigures
    teacher: ModelFigures | None = None
    comparison: Comparison | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


@dataclass(slots=True)
class Measured:
    """A model under evaluation with the seconds that its logits took."""

    scorer: Scorer
    name: str
    file_bytes: int
    seconds: float = 0.0
    num_scored: int = 0

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """The scorer's, on the clock."""
        started = time.perf_counter()
        result = self.scorer.logits(ids)
        self.seconds += time.perf_counter() - started
        self.num_scored += ids.shape[0]
        return result

    def figures(self, perplexity: float, decode_tokens_per_s: float) -> ModelFigures:
        """All that is known now."""
        return ModelFigures(
            name=self.name,
            engine=self.scorer.engine,
            dtype=self.scorer.dtype,
            perplexity=perplexity,
            file_bytes=self.file_bytes,
            weights_bytes=self.scorer.weights_bytes,
            prefill_tokens_per_s=self.num_scored / max(self.seconds, 1e-9),
            decode_tokens_per_s=decode_tokens_per_s,
        )


def score(
    model: Measured,
    teacher: Measured | None,
    windows: torch.Tensor,
    on_window: OnWindow = lambda done, total: None,
) -> Sums:
    """Run int64 [n, context] through both; each window predicts all its tokens but the first."""
    sums = Sums()
    # The first pass of a network is slower than those that follow.
    for each in (model, teacher):
        if each is not None:
            each.scorer.logits(windows[0])
    for index, ids in enumerate(windows):
        other = None if teacher is None else teacher.logits(ids)[:-1]
        sums.add(model.logits(ids)[:-1], ids[1:], other)
        on_window(index + 1, len(windows))
    return sums


def compare(sums: Sums, model: ModelFigures, teacher: ModelFigures) -> Comparison:
    """The ratios of interest."""
    return Comparison(
        kl=sums.kl / sums.num_tokens,
        top1=sums.matches / sums.num_tokens,
        perplexity_increase=model.perplexity / teacher.perplexity - 1,
        size_share=model.file_bytes / teacher.file_bytes,
        decode_speedup=model.decode_tokens_per_s / max(teacher.decode_tokens_per_s, 1e-9),
    )
