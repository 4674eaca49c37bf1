"""The two commands: their options, one-line errors and exit codes."""

from __future__ import annotations

import argparse
import json

import pytest

from serve_app.cli.main import main
from serve_app.quantize import eval_main
from serve_app.quantize.main import add_arguments, recipe_of
from serve_app.quantize.recipe import PRESETS


def _recipe(*words: str):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return recipe_of(parser.parse_args(["model", "--output", "out", *words]))


def test_options_change_the_preset_and_nothing_else():
    assert _recipe() == PRESETS["balanced"]
    recipe = _recipe("--preset", "quick", "--bits", "8", "--asymmetric", "--skip", "lm_head", "q")
    assert (recipe.algorithm, recipe.bits, recipe.is_symmetric) == ("rtn", 8, False)
    assert recipe.skip == ("lm_head", "q")
    assert _recipe("--wide").wide == ()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere", "--output", "{tmp}/o"], "nowhere does not exist"),
        (["{model}", "--output", "{tmp}/o", "--iterations", "-1"], "--iterations: less than 0"),
        (["{model}", "--output", "{tmp}/o", "--calibration", "{tmp}/no"], "--calibration: "),
        (["{model}", "--output", "{tmp}"], "--output: "),
    ],
)
def test_a_users_mistake_is_one_line(tiny_folder, tmp_path, capsys, monkeypatch, words, message):
    from serve_app.quantize import pipeline

    monkeypatch.setattr(pipeline, "check_installed", lambda: None)
    words = [word.format(tmp=tmp_path, model=tiny_folder) for word in words]
    assert main(["quantize", *words]) == 1
    error = capsys.readouterr().err
    assert error.startswith("xeray: ")
    assert message in error
    assert error.count("\n") == 1


def test_eval_prints_a_table_and_writes_json(tiny_folder, tmp_path, capsys):
    path = tmp_path / "report.json"
    words = ["--windows", "2", "--context", "64", "--decode-tokens", "4", "--device", "cpu"]
    folder = str(tiny_folder)
    assert main(["eval", folder, "--against", folder, *words, "--json", str(path)]) == 0
    output = capsys.readouterr().out
    assert "126 tokens of time_machine.txt" in output
    assert "top-1 agreement 100.00%" in output
    report = json.loads(path.read_text())
    assert report["comparison"]["top1"] == 1
    assert report["comparison"]["perplexity_increase"] == 0
    assert report["model"]["decode_tokens_per_s"] > 0
    assert report["failures"] == []


def test_both_engines_agree_on_perplexity(tiny_folder, tmp_path):
    found = []
    for engine in ("native", "transformers"):
        path = tmp_path / f"{engine}.json"
        words = ["--engine", engine, "--dtype", "float32", "--device", "cpu", "--json", str(path)]
        words += ["--windows", "2", "--context", "64", "--decode-tokens", "2"]
        assert main(["eval", str(tiny_folder), *words]) == 0
        found.append(json.loads(path.read_text())["model"]["perplexity"])
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_a_threshold_that_does_not_hold_is_exit_one(tiny_folder, untied_folder, tmp_path, capsys):
    words = ["--windows", "1", "--context", "32", "--decode-tokens", "0", "--device", "cpu"]
    assert main(["eval", str(untied_folder), "--against", str(tiny_folder), *words]) == 1
    assert "does not hold: top-1 agreement" in capsys.readouterr().out
    relaxed = ["--min-top1", "0"]
    assert main(["eval", str(untied_folder), "--against", str(tiny_folder), *words, *relaxed]) == 0


def test_models_of_other_vocabularies_are_not_compared(tiny_folder, capsys):
    assert main(["eval", str(tiny_folder), "--against", "embedded", "--device", "cpu"]) == 1
    assert "only models of one vocabulary" in capsys.readouterr().err


def test_a_window_longer_than_the_model_is_named(tiny_folder, capsys):
    assert main(["eval", str(tiny_folder), "--context", "512", "--device", "cpu"]) == 1
    assert "--context: the models end at 256" in capsys.readouterr().err
    assert eval_main.EVALUATION_TEXT == "time_machine.txt"
