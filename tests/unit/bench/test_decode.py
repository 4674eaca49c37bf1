from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import pytest

from serve_app.bench import decode
from serve_app.bench.decode import SHAPES, DecodeOptions, measure_decode, weight_bytes_read
from serve_app.bench.main import add_parsers, run_decode
from serve_app.core.errors import ConfigError

TINY = replace(
    SHAPES["smollm2-135m"],
    hidden_size=64,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=32,
    rope_dim=32,
    intermediate_size=96,
    vocab_size=256,
    max_position=256,
)


@pytest.fixture
def tiny_shape(monkeypatch):
    monkeypatch.setitem(decode.SHAPES, "tiny", TINY)
    monkeypatch.setattr(decode, "copy_bandwidth", lambda device: 1e9)


def test_a_step_reads_every_matrix_but_the_embedding():
    # Qwen2-7B has 7.6e9 weights, 0.545e9 of them in the embedding
    assert weight_bytes_read(SHAPES["qwen2-7b"], "dense", 2) == pytest.approx(14.14e9, rel=1e-3)
    packed = weight_bytes_read(SHAPES["qwen2-7b"], "int4", 2)
    assert packed == pytest.approx(6.525e9 * 5 / 8 + 1.09e9, rel=1e-3)


def test_each_part_is_measured_and_counted(tiny_shape):
    options = DecodeOptions(
        shape="tiny", device="cpu", concurrencies=(1, 3), samplings=("greedy", "penalties"),
        prompt_tokens=8, output_tokens=4, long_tokens=40, long_concurrency=2, prefill_tokens=20,
        num_rounds=1,
    )  # fmt: skip
    lines: list[str] = []
    report = measure_decode(options, lines.append)
    cases = [(line["sampling"], line["concurrency"]) for line in report.decode]
    assert cases == [("greedy", 1), ("greedy", 3), ("penalties", 1), ("penalties", 3)]
    for line in report.decode:
        step_s = line["concurrency"] / line["tokens_per_s"]
        assert line["share"] == pytest.approx(report.weight_bytes / 1e9 / step_s)
    assert report.long_context["prompt_tokens"] == 40
    assert report.prefill["num_tokens"] == 20
    assert report.prefill["share"] > 0
    assert len(lines) == 1 + 4 + 2


def test_the_command_prints_and_writes(tiny_shape, tmp_path: Path, capsys):
    parser = argparse.ArgumentParser()
    add_parsers(parser)
    path = tmp_path / "figures.json"
    words = "decode --shape tiny --device cpu --concurrency 2 --prompt-tokens 4 --output-tokens 3"
    words += f" --long-tokens 0 --prefill-tokens 0 --rounds 1 --sampling top-p --json {path}"
    options = parser.parse_args(words.split())
    assert options.run is run_decode
    assert run_decode(options) == 0
    report = json.loads(path.read_text())["decode"]
    assert [line["concurrency"] for line in report["decode"]] == [2]
    assert report["long_context"] is None
    assert "of the limit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"shape": "huge"}, "--shape"), ({"concurrencies": (0,)}, "--concurrency"),
     ({"output_tokens": 1}, "--output-tokens"), ({"group_size": 48}, "--group-size")],
)  # fmt: skip
def test_bad_options_are_named(changes, named):
    with pytest.raises(ConfigError, match=named):
        DecodeOptions(**changes)
