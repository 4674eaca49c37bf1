from __future__ import annotations

import argparse
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from serve_app.bench import speculative
from serve_app.bench.baseline_network import ChecksumNetwork, checksum_model
from serve_app.bench.main import add_parsers
from serve_app.bench.speculative import (
    BatchFigures,
    Comparison,
    SpeculativeOptions,
    measure_speculative,
    speculative_table,
)
from serve_app.bench.speculative_prompts import WORKLOADS, make_prompts
from serve_app.config.schema import AppConfig, EngineSection
from serve_app.core.errors import ConfigError
from serve_app.core.requests import PreparedPrompt, PrepareRequest
from serve_app.engine.native import NativeEngine

SECTION = EngineSection(
    device="cpu",
    kv_cache_tokens=2048,
    max_num_seqs=4,
    warmup=False,
    enable_prefix_caching=False,
    speculative={"method": "prompt_lookup", "min_ngram": 1},
)


class LetterPreparer:
    """Four ids for a prompt's characters; no answer ends by itself."""

    card = SimpleNamespace(eos_token_ids=())

    def __init__(self, model: object) -> None:
        self.model = model

    def prepare(self, request: PrepareRequest) -> PreparedPrompt:
        text = request.messages[0]["content"]
        return PreparedPrompt(tuple(ord(char) % 4 for char in text[:40]))


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[NativeEngine]:
    model = checksum_model()
    model.network = ChecksumNetwork(vocab_size=4)
    engine = NativeEngine(model, SECTION)
    monkeypatch.setattr("serve_app.engine.factory.create_engine", lambda *_: engine)
    monkeypatch.setattr(speculative, "PromptPreparer", LetterPreparer)
    return engine


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="xeray bench")
    add_parsers(parser)
    return parser.parse_args(words)


def test_the_same_prompts_are_answered_with_drafts_and_without(engine: NativeEngine) -> None:
    options = SpeculativeOptions(
        workloads=("copy", "chat"), concurrencies=(1, 3), output_tokens=24, num_rounds=2
    )
    lines: list[str] = []
    report = measure_speculative(AppConfig(engine=SECTION), options, lines.append)
    cases = [(entry["workload"], entry["concurrency"]) for entry in report]
    assert cases == [("copy", 1), ("copy", 3), ("chat", 1), ("chat", 3)]
    assert len(lines) == 8
    for entry in report:
        assert entry["num_answers"] == entry["num_equal_answers"] == 2 * entry["concurrency"]
        assert entry["num_tokens"] == 24 * entry["num_answers"]
        assert 0 < entry["num_accepted_tokens"] < entry["num_draft_tokens"]
        assert entry["num_steps_with"] < entry["num_steps_without"]
        assert entry["min_ratio"] <= entry["ratio"] <= entry["max_ratio"]
    table = speculative_table(report).splitlines()
    assert len(table) == 2 + len(report)
    assert table[2].split()[:2] == ["copy", "1"]


def test_ratios_pair_the_rounds() -> None:
    def batch(rate: float, ids: list[int], drafted: int = 0, accepted: int = 0) -> BatchFigures:
        return BatchFigures([ids], rate, len(ids), drafted, accepted)

    comparison = Comparison(
        "copy",
        1,
        without=[batch(10.0, [1, 2]), batch(20.0, [3, 4])],
        with_drafts=[batch(30.0, [1, 2], 6, 3), batch(30.0, [3, 5], 2, 1)],
    )
    figures = comparison.to_dict()
    assert comparison.ratios == [3.0, 1.5]
    assert (figures["ratio"], figures["min_ratio"], figures["max_ratio"]) == (2.25, 1.5, 3.0)
    assert (figures["num_equal_answers"], figures["num_answers"]) == (1, 2)
    assert (figures["acceptance"], figures["drafts_per_token"]) == (0.5, 2.0)


def test_prompts_are_the_same_for_the_same_seed_and_differ_otherwise() -> None:
    for name in WORKLOADS:
        prompts = make_prompts(name, 4, seed=1)
        assert prompts == make_prompts(name, 4, seed=1)
        assert prompts != make_prompts(name, 4, seed=2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--rounds", "0"), "--rounds: 0 is less than 1"),
        (("--concurrency", "1", "0"), "--concurrency: 0 is less than 1"),
        (("--concurrency", "999"), "--concurrency: 999 is more than engine.max_num_seqs"),
        (("--set", "engine.kind=openvino"), "needs kind: native, not openvino"),
    ],
)
def test_what_cannot_be_measured_is_refused(words: tuple[str, ...], message: str) -> None:
    options = parse("speculative", *words)
    with pytest.raises(ConfigError) as caught:
        options.run(options)
    assert message in caught.value.message
