from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from serve_app.cli.main import EXIT_ERROR, main

SEVEN_B = ["plan", "--model", "deepseek-r1-distill-qwen-7b", "--max-model-len", "8192"]


def as_json(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    main([*arguments, "--json"])
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def test_what_cannot_fit_is_refused_with_the_arithmetic(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*SEVEN_B, "--memory", "12GiB"]) == EXIT_ERROR
    printed = capsys.readouterr().out
    assert "Does not fit: " in printed
    assert "7.62 B × 16 bits" in printed
    assert "2 × 28 layers × 4 heads × 128 × 2 B" in printed
    assert "Fits with --weights int4" in printed


def test_what_was_suggested_fits(capsys: pytest.CaptureFixture[str]) -> None:
    refused = as_json([*SEVEN_B, "--memory", "12GiB"], capsys)

    assert refused["fits"] is False
    assert refused["alternatives"]
    for alternative in refused["alternatives"]:
        assert main([*SEVEN_B, "--memory", "12GiB", *alternative.split()]) == 0


def test_the_sum(capsys: pytest.CaptureFixture[str]) -> None:
    plan = as_json([*SEVEN_B, "--memory", "16GiB", "--weights", "int4"], capsys)

    parts = (
        "weights_bytes",
        "dense_copy_bytes",
        "runtime_bytes",
        "activations_bytes",
        "kv_cache_bytes",
    )
    assert sum(plan[part] for part in parts) == plan["needed_bytes"]
    assert plan["needed_bytes"] + plan["left_bytes"] == 16 << 30
    assert plan["kv_cache_tokens"] * plan["kv_bytes_per_token"] == plan["kv_cache_bytes"]
    assert plan["fits"] is True


def test_the_embedded_model_on_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    plan = as_json(["plan", "--device", "cpu", "--max-num-seqs", "4"], capsys)

    assert plan["model"] == "SmolLM2-135M-Instruct"
    assert plan["weight_format"] == "int4"
    assert plan["fits"] is True


def test_settings_come_from_the_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text(
        "applications:\n- name: llm\n  import_path: serve_app:build_app\n  args:\n"
        "    model: {path: embedded, max_model_len: 1024}\n"
        "    engine: {device: cpu, max_num_seqs: 3, kv_cache_tokens: 2048}\n"
    )

    plan = as_json(["plan", str(config), "--max-num-seqs", "2"], capsys)

    assert (plan["max_model_len"], plan["max_num_seqs"]) == (1024, 2)
    assert plan["kv_cache_tokens"] == 2048


def test_a_context_longer_than_the_model_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "--device", "cpu", "--max-model-len", "9000"]

    assert main(arguments) == EXIT_ERROR
    assert "8192" in capsys.readouterr().err


def test_an_unknown_model_names_those_that_are_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", "gpt-9", "--memory", "8GiB"]) == EXIT_ERROR
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "deepseek-r1-distill-qwen-7b" in error


def test_a_device_that_is_not_here(capsys: pytest.CaptureFixture[str]) -> None:
    torch = pytest.importorskip("torch")
    if torch.xpu.is_available():
        pytest.skip("this machine has an XPU")

    assert main(["plan", "--device", "xpu"]) == EXIT_ERROR
    assert "--memory 16GiB" in capsys.readouterr().err


def test_a_float16_plan_and_a_float32_plan_differ_in_kv(
    capsys: pytest.CaptureFixture[str],
) -> None:
    half = as_json([*SEVEN_B, "--memory", "64GiB", "--dtype", "float16"], capsys)
    full = as_json([*SEVEN_B, "--memory", "64GiB", "--dtype", "float32"], capsys)

    assert full["kv_bytes_per_token"] == 2 * half["kv_bytes_per_token"]


def test_the_plan_is_what_the_loader_takes(capsys: pytest.CaptureFixture[str]) -> None:
    from serve_app.config.model_source import resolve_model
    from serve_app.config.schema import ModelSection
    from serve_app.models.loading.loader import load_model

    plan = as_json(["plan", "--device", "cpu"], capsys)
    loaded = load_model(resolve_model(ModelSection(path="embedded")).path)

    assert str(loaded.dtype) == f"torch.{plan['dtype']}"
    planned = plan["weights_bytes"] + plan["dense_copy_bytes"]
    assert planned == pytest.approx(loaded.weights_bytes, rel=0.1)
