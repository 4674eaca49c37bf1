"""`xeray bench speculative`: what drafts by prompt lookup bring, and where they cost.

One engine answers the same prompts with drafts and without, in turn and in changing order, so that
both meet the same machine. Greedy, ended by the model or at `output_tokens`, no prefix cached.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from serve_app.bench import options as common
from serve_app.bench.report import format_table
from serve_app.bench.speculative_prompts import WORKLOADS, make_prompts
from serve_app.config.load import load_serve_file
from serve_app.config.schema import AppConfig
from serve_app.core.errors import ConfigError, EngineError
from serve_app.core.events import FinishReason
from serve_app.core.requests import PrepareRequest
from serve_app.core.sampling import SamplingParams
from serve_app.deployments.prompt_preparation import PromptPreparer
from serve_app.engine.native import NativeEngine

_CHANGES = ("engine.speculative.method=prompt_lookup", "engine.enable_prefix_caching=false")

Prompt = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SpeculativeOptions:
    """What each round runs: for each workload and concurrency one batch with drafts, one without.

    Each answer has at most `output_tokens` tokens.
    """

    workloads: tuple[str, ...] = tuple(WORKLOADS)
    concurrencies: tuple[int, ...] = (1, 8)
    output_tokens: int = 128
    num_rounds: int = 5
    seed: int = 0


@dataclass(slots=True)
class BatchFigures:
    """One batch: its answers in the order of the prompts, its rate, its drafts."""

    answers: list[list[int]]
    tokens_per_s: float
    num_steps: int
    num_draft_tokens: int
    num_accepted_tokens: int


@dataclass(slots=True)
class Comparison:
    """The rounds of one workload at one concurrency: batches without drafts and with them."""

    workload: str
    concurrency: int
    without: list[BatchFigures] = field(default_factory=list)
    with_drafts: list[BatchFigures] = field(default_factory=list)

    @property
    def ratios(self) -> list[float]:
        """Each round's tokens per second with drafts over those without."""
        pairs = zip(self.with_drafts, self.without, strict=True)
        return [on.tokens_per_s / off.tokens_per_s for on, off in pairs]

    def to_dict(self) -> dict[str, Any]:
        """Medians over the rounds, the ratios' spread, and what became of the drafts."""
        ratios = self.ratios
        drafted = sum(batch.num_draft_tokens for batch in self.with_drafts)
        accepted = sum(batch.num_accepted_tokens for batch in self.with_drafts)
        pairs = [
            (on, off)
            for with_drafts, without in zip(self.with_drafts, self.without, strict=True)
            for on, off in zip(with_drafts.answers, without.answers, strict=True)
        ]
        num_tokens = sum(len(on) for on, _ in pairs)
        return {
            "workload": self.workload,
            "concurrency": self.concurrency,
            "tokens_per_s_without": statistics.median(b.tokens_per_s for b in self.without),
            "tokens_per_s_with": statistics.median(b.tokens_per_s for b in self.with_drafts),
            "ratio": statistics.median(ratios),
            "min_ratio": min(ratios),
            "max_ratio": max(ratios),
            "num_tokens": num_tokens,
            "num_steps_without": sum(batch.num_steps for batch in self.without),
            "num_steps_with": sum(batch.num_steps for batch in self.with_drafts),
            "num_draft_tokens": drafted,
            "num_accepted_tokens": accepted,
            "acceptance": accepted / drafted if drafted else 0.0,
            "drafts_per_token": drafted / num_tokens if num_tokens else 0.0,
            "num_answers": len(pairs),
            "num_equal_answers": sum(on == off for on, off in pairs),
        }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `xeray bench speculative`."""
    common.add_config(parser)
    parser.add_argument(
        "--workload", nargs="+", choices=tuple(WORKLOADS), help="what is asked (all of them)"
    )
    parser.add_argument("--concurrency", type=int, nargs="+", help="batch sizes (1 8)")
    parser.add_argument("--output-tokens", type=int, help="most tokens of each answer (128)")
    parser.add_argument("--rounds", type=int, help="times that each batch runs (5)")
    parser.add_argument("--seed", type=int, help="decides everything random (0)")


def run(options: argparse.Namespace) -> int:
    """Measure the engine with drafts and without, and print the table."""
    changes = [*common.overrides(options), *_CHANGES]
    app = load_serve_file(common.config_path(options), changes).app
    report = measure_speculative(app, _options(options), lambda line: print(line, flush=True))
    print(speculative_table(report))
    common.write_json(options, {"speculative": report})
    return 0


def _options(options: argparse.Namespace) -> SpeculativeOptions:
    names = {
        "workload": "workloads",
        "concurrency": "concurrencies",
        "output_tokens": "output_tokens",
        "rounds": "num_rounds",
        "seed": "seed",
    }
    given: dict[str, Any] = {}
    for option, name in names.items():
        value = getattr(options, option, None)
        if value is None:
            continue
        numbers = [n for n in (value if isinstance(value, list) else [value]) if n is not None]
        if option not in ("workload", "seed") and min(numbers) < 1:
            flag = f"--{option.replace('_', '-')}"
            raise ConfigError(f"{flag}: {min(numbers)} is less than 1", param=option)
        given[name] = tuple(value) if isinstance(value, list) else value
    return SpeculativeOptions(**given)


def measure_speculative(
    app: AppConfig, options: SpeculativeOptions, on_line: Callable[[str], None] = lambda _: None
) -> list[dict[str, Any]]:
    """Load the engine of `app`, whose drafts are on, run the rounds, close it.

    Raises ConfigError where the config's engine makes no drafts or a concurrency is beyond it,
    EngineError where a sequence fails.
    """
    from serve_app.engine.factory import create_engine

    largest = max(options.concurrencies)
    if largest > app.engine.max_num_seqs:
        raise ConfigError(
            f"--concurrency: {largest} is more than engine.max_num_seqs"
            f" ({app.engine.max_num_seqs})",
            param="concurrency",
        )
    preparer = PromptPreparer(app.model)
    engine = create_engine(app.model, app.engine)
    assert isinstance(engine, NativeEngine), "the config allows no other engine with drafts"
    try:
        bench = _Bench(engine, preparer, options)
        return [comparison.to_dict() for comparison in bench.run(on_line)]
    finally:
        engine.close()


class _Bench:
    """The rounds, over one engine."""

    def __init__(
        self, engine: NativeEngine, preparer: PromptPreparer, options: SpeculativeOptions
    ) -> None:
        self._engine = engine
        self._preparer = preparer
        self._options = options
        self._sampling = SamplingParams(
            max_tokens=options.output_tokens,
            temperature=0.0,
            stop_token_ids=preparer.card.eos_token_ids,
        )

    def run(self, on_line: Callable[[str], None]) -> list[Comparison]:
        comparisons = [
            Comparison(workload, size)
            for workload in self._options.workloads
            for size in self._options.concurrencies
        ]
        self._answer(self._prompts("copy", 1, -1))
        for number in range(self._options.num_rounds):
            for comparison in comparisons:
                prompts = self._prompts(comparison.workload, comparison.concurrency, number)
                for is_on in (False, True) if number % 2 == 0 else (True, False):
                    self._engine.speculate(is_on)
                    batch = self._answer(prompts)
                    (comparison.with_drafts if is_on else comparison.without).append(batch)
                on_line(
                    f"  round {number + 1}, {comparison.workload} × {comparison.concurrency}:"
                    f" {comparison.without[-1].tokens_per_s:.1f} tokens/s without,"
                    f" {comparison.with_drafts[-1].tokens_per_s:.1f} with"
                )
        return comparisons

    def _prompts(self, workload: str, size: int, number: int) -> list[Prompt]:
        seed = 1_000_003 * self._options.seed + 1_009 * number + size
        prompts = []
        for index, text in enumerate(make_prompts(workload, size, seed)):
            messages = ({"role": "user", "content": text},)
            prepared = self._preparer.prepare(PrepareRequest(str(index), messages=messages))
            if prepared.error is not None:
                raise EngineError(f"a prompt cannot be prepared: {prepared.error.message}")
            prompts.append(tuple(prepared.token_ids))
        return prompts

    def _answer(self, prompts: Sequence[Prompt]) -> BatchFigures:
        engine, before = self._engine, self._engine.stats()
        names = [f"speculative-{index}" for index in range(len(prompts))]
        answers: dict[str, list[int]] = {name: [] for name in names}
        begin_s = time.perf_counter()
        for name, prompt in zip(names, prompts, strict=True):
            engine.submit(name, prompt, self._sampling)
        while engine.has_work():
            for event in engine.step():
                if event.finish_reason in (FinishReason.ERROR, FinishReason.ABORTED):
                    reason = event.error.message if event.error else event.finish_reason.value
                    raise EngineError(f"the engine failed during the measurement: {reason}")
                answers[event.request_id] += event.new_token_ids
        seconds = time.perf_counter() - begin_s
        after = engine.stats()
        return BatchFigures(
            answers=[answers[name] for name in names],
            tokens_per_s=sum(map(len, answers.values())) / seconds,
            num_steps=after.num_steps_total - before.num_steps_total,
            num_draft_tokens=after.num_draft_tokens_total - before.num_draft_tokens_total,
            num_accepted_tokens=after.num_accepted_tokens_total - before.num_accepted_tokens_total,
        )


_COLUMNS = {
    "workload": "workload",
    "concurrency": "concurrency",
    "tokens/s without": "tokens_per_s_without",
    "with": "tokens_per_s_with",
    "ratio": "ratio",
    "min": "min_ratio",
    "max": "max_ratio",
    "drafted per token": "drafts_per_token",
    "accepted": "acceptance",
    "same answers": "num_equal_answers",
    "of": "num_answers",
}


def speculative_table(report: Sequence[dict[str, Any]]) -> str:
    """Return the figures of `Comparison.to_dict` as a table; rates are medians over rounds."""
    rows = [[_cell(entry[key]) for key in _COLUMNS.values()] for entry in report]
    return format_table(tuple(_COLUMNS), rows)


def _cell(value: Any) -> Any:
    return f"{value:.2f}" if isinstance(value, float) and value < 20 else value
