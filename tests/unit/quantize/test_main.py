"""The two commands: their options, one-line errors and exit codes."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file

from serve_app.cli.main import main
from serve_app.core.errors import ConfigError
from serve_app.quantize import eval_main
from serve_app.quantize.main import add_arguments, recipe_of
from serve_app.quantize.recipe import PRESETS
from serve_app.quantize.scoring import open_scorer


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


def test_transformers_reads_a_gguf_file_of_an_architecture_that_it_knows(tiny_folder, tmp_path):
    path = _write_gguf(tiny_folder, tmp_path / "tiny.gguf")
    ids = torch.arange(40, 80)
    logits = [
        open_scorer(each, "transformers", device="cpu", dtype="float32").logits(ids)
        for each in (tiny_folder, path)
    ]
    assert (logits[0] - logits[1]).abs().max() < 1e-4


def test_transformers_refuses_an_unknown_gguf_architecture_in_one_line(tiny_folder, tmp_path):
    path = _write_gguf(tiny_folder, tmp_path / "odd.gguf", architecture="odd")
    with pytest.raises(ConfigError, match=r"transformers cannot load odd\.gguf: .*odd") as error:
        open_scorer(path, "transformers", device="cpu", dtype="float32")
    assert "\n" not in error.value.message


def _write_gguf(folder: Path, path: Path, architecture: str = "llama") -> Path:
    """The tiny Llama in F32, the rows of q and k by neighbouring pairs as such files have them."""
    config = json.loads((folder / "config.json").read_text())
    heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads["q"])
    writer.add_head_count_kv(heads["k"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config["vocab_size"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, weight in load_file(folder / "model.safetensors").items():
        if (kind := name.split(".")[-2][0]) in heads and name.endswith(
            ("q_proj.weight", "k_proj.weight")
        ):
            weight = (
                weight.view(heads[kind], 2, -1, weight.shape[1])
                .transpose(1, 2)
                .reshape(weight.shape)
            )
        writer.add_tensor(names.get_name(name, (".weight",)), weight.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_threshold_that_does_not_hold_is_exit_one(tiny_folder, untied_folder, tmp_path, capsys):
    words = ["--windows", "1", "--context", "32", "--decode-tokens", "0", "--device", "cpu"]
    assert main(["eval", str(untied_folder), "--against", str(tiny_folder), *words]) == 1
    output = " ".join(capsys.readouterr().out.split())
    assert "does not hold: top-1 agreement" in output
    assert "points below 97.00% (--min-top1)" in output
    assert "what helps: 8 bits" in output
    relaxed = ["--min-top1", "0"]
    assert main(["eval", str(untied_folder), "--against", str(tiny_folder), *words, *relaxed]) == 0


def test_models_of_other_vocabularies_are_not_compared(tiny_folder, capsys):
    assert main(["eval", str(tiny_folder), "--against", "embedded", "--device", "cpu"]) == 1
    assert "only models of one vocabulary" in capsys.readouterr().err


def test_a_window_longer_than_the_model_is_named(tiny_folder, capsys):
    assert main(["eval", str(tiny_folder), "--context", "512", "--device", "cpu"]) == 1
    assert "--context: the models end at 256" in capsys.readouterr().err
    assert eval_main.EVALUATION_TEXT == "time_machine.txt"
