from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from serve_app.bench.preprocess import (
    PreprocessOptions,
    make_requests,
    measure_here,
    measure_preprocess,
    preprocess_table,
    speedup_lines,
)
from serve_app.config.schema import ModelSection
from serve_app.core.errors import ConfigError, ErrorInfo
from serve_app.core.requests import PreparedPrompt, PrepareRequest

OPTIONS = PreprocessOptions(threads=(1, 2), num_prompts=8, prompt_tokens=20, num_rounds=1)


class CountingPreparer:
    """Notes the size of each call; with `parties`, each single call waits for so many at once."""

    def __init__(self, parties: int = 1) -> None:
        self.sizes: list[int] = []
        self._barrier = threading.Barrier(parties)

    def prepare_batch(self, requests: Sequence[PrepareRequest]) -> list[PreparedPrompt]:
        self.sizes.append(len(requests))
        if len(requests) == 1:
            self._barrier.wait(timeout=30)
        return [PreparedPrompt(token_ids=(1, 2, 3)) for _ in requests]


def test_off_calls_one_by_one_on_all_threads_and_on_calls_in_batches() -> None:
    preparer: Any = CountingPreparer(parties=4)
    options = PreprocessOptions(num_prompts=8, batch_size=4, num_rounds=1)

    figures = measure_here(preparer, options, num_threads=4)

    per_kind = [8, *[1] * 8, 4, 4]
    assert preparer.sizes == per_kind * 2, "warm-up, off, on; for chat and for text"
    assert figures["chat_tokens"] == figures["text_tokens"] == 3
    for kind in ("chat", "text"):
        assert figures[f"{kind}_off"] > 0
        assert figures[f"{kind}_on"] > 0


def test_prompts_are_the_same_for_the_same_seed() -> None:
    chat, text = make_requests("chat", OPTIONS), make_requests("text", OPTIONS)

    assert chat == make_requests("chat", OPTIONS)
    assert [request.text for request in text] == [
        "\n".join(message["content"] for message in request.messages or ()) for request in chat
    ]


def test_prompts_that_cannot_be_prepared_are_no_speed() -> None:
    class Refusing:
        def prepare_batch(self, requests: Sequence[PrepareRequest]) -> list[PreparedPrompt]:
            error = ErrorInfo(400, "invalid_request_error", "invalid_value", "no chat template")
            return [PreparedPrompt(error=error) for _ in requests]

    with pytest.raises(ConfigError, match="chat prompts cannot be prepared: no chat template"):
        measure_here(Refusing(), OPTIONS, num_threads=1)  # type: ignore[arg-type]


def test_a_process_that_fails_is_one_error() -> None:
    with pytest.raises(ConfigError, match="prompts could not be prepared; see the lines above"):
        measure_preprocess(ModelSection(path="/nowhere.gguf"), OPTIONS)


def test_each_number_of_threads_runs_in_a_process_of_its_own() -> None:
    report = measure_preprocess(ModelSection(), replace(OPTIONS, threads=(2,)))

    assert [figures["threads"] for figures in report] == [2]
    assert 1 <= report[0]["num_cores"] <= 2
    for figures in report:
        assert figures["chat_tokens"] > figures["text_tokens"] > 10
        rates = [figures[f"{k}_{m}"] for k in ("chat", "text") for m in ("off", "on", "replicas")]
        assert min(rates) > 0
    assert len(preprocess_table(report).splitlines()) == 3


@pytest.mark.parametrize(
    ("rate", "cores", "verdict"),
    [
        (600.0, 16, "16 replicas 6.0 ×; target ≥ 6 × on 16 cores: holds"),
        (590.0, 16, "16 replicas 5.9 ×; target ≥ 6 × on 16 cores: DOES NOT HOLD"),
        (150.0, 2, "not to be judged on 2 cores"),
    ],
)
def test_the_target_is_judged_on_sixteen_cores(rate: float, cores: int, verdict: str) -> None:
    def figures(threads: int, num_cores: int, fast: float) -> dict[str, Any]:
        rates = {f"{kind}_on": 50.0 for kind in ("chat", "text")}
        for kind in ("chat", "text"):
            rates |= {f"{kind}_off": fast / 2 if threads > 1 else fast, f"{kind}_replicas": fast}
        return {"threads": threads, "num_cores": num_cores, **rates}

    lines = speedup_lines([figures(1, 1, 100.0), figures(16, cores, rate)])

    assert len(lines) == 2
    assert all(verdict in line for line in lines)
    assert speedup_lines([figures(1, 1, 100.0)]) == []
