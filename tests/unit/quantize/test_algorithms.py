"""neural-compressor's algorithms on a tiny model, where the extra is installed."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from serve_app.config.model_source import resolve_model
from serve_app.config.schema import ModelSection
from serve_app.core.errors import ConfigError
from serve_app.quantize import algorithms
from serve_app.quantize.folder import tensor_shapes
from serve_app.quantize.pipeline import Job, run_job
from serve_app.quantize.recipe import Recipe
from serve_app.quantize.scoring import open_scorer

needs_extra = pytest.mark.skipif(
    importlib.util.find_spec("neural_compressor") is None
    or importlib.util.find_spec("auto_round") is None,
    reason="the quantize extra is not installed",
)
# The libraries' warnings are theirs to mend.
pytestmark = pytest.mark.filterwarnings("ignore")
FAST = {"num_samples": 2, "sample_tokens": 32, "batch_size": 2, "iterations": 2}


def _run(folder: Path, output: Path, **changes: object) -> list[str]:
    lines: list[str] = []
    source = resolve_model(ModelSection(path=str(folder)))
    run_job(Job(source, output, Recipe(**{**FAST, **changes})), lines.append)  # type: ignore[arg-type]
    return lines


@needs_extra
@pytest.mark.parametrize(
    ("algorithm", "changes"),
    [
        ("rtn", {"wide": ("last:1:down_proj",)}),
        ("rtn", {"bits": 8, "is_symmetric": False}),
        ("gptq", {"wide": ("v_proj",), "skip": ("lm_head", "first:1:o_proj")}),
        ("awq", {"skip": ("lm_head", "o_proj")}),
        ("autoround", {"wide": ("v_proj",), "skip": ("lm_head", "first:1:o_proj")}),
    ],
)
def test_a_folder_comes_out_whole_and_close(tiny_folder, tmp_path, algorithm, changes):
    output = tmp_path / "out"
    lines = _run(tiny_folder, output, algorithm=algorithm, **changes)
    assert any(line.startswith("verified") for line in lines)
    assert not output.with_name("out.partial").exists()
    config = json.loads((output / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "auto-round"
    assert (output / "tokenizer.json").read_bytes() == (tiny_folder / "tokenizer.json").read_bytes()
    shapes = tensor_shapes(output)
    assert shapes["model.embed_tokens.weight"][1] == "BF16"
    assert "lm_head.weight" not in shapes
    ids = torch.arange(5, 45)
    teacher, student = (
        open_scorer(path, "native", device="cpu", dtype="float32").logits(ids)
        for path in (tiny_folder, output)
    )
    cosine = torch.cosine_similarity(teacher, student, dim=-1).mean()
    assert cosine > (0.999 if changes.get("bits") == 8 else 0.9)


@pytest.fixture
def mixture_folder(tiny_folder, tmp_path) -> Path:
    """A DeepSeek-V2 of two layers, the second with four routed experts and one shared."""
    from transformers import AutoModelForCausalLM, DeepseekV2Config

    torch.manual_seed(0)
    config = DeepseekV2Config(
        vocab_size=2048,
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=None,
        kv_lora_rank=32,
        qk_nope_head_dim=32,
        qk_rope_head_dim=32,
        v_head_dim=32,
        max_position_embeddings=256,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=0,
    )
    folder = tmp_path / "mixture"
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tiny_folder / name).read_bytes())
    return folder


@needs_extra
def test_a_mixtures_experts_are_quantized_and_none_is_missing(mixture_folder, tmp_path):
    output = tmp_path / "out"
    lines = _run(mixture_folder, output, algorithm="autoround")
    assert any(line.startswith("verified") for line in lines)
    experts = [name for name in tensor_shapes(output) if ".experts." in name]
    assert len([name for name in experts if name.endswith(".qweight")]) == 4 * 3
    assert not any(name.endswith(".weight") for name in experts)


@needs_extra
def test_other_algorithms_refuse_a_mixture(mixture_folder, tmp_path):
    with pytest.raises(ConfigError, match="does not reach the experts"):
        _run(mixture_folder, tmp_path / "out", algorithm="gptq")


@needs_extra
def test_what_the_library_refuses_is_one_line_that_names_the_log(
    tiny_folder, tmp_path, monkeypatch
):
    def refuse(*_: object) -> None:
        raise AssertionError("no such layer\nand more")

    monkeypatch.setattr(algorithms, "_in_memory", refuse)
    with pytest.raises(ConfigError, match=r"rtn failed on tiny: no such layer; .*log\.txt$"):
        _run(tiny_folder, tmp_path / "out", algorithm="rtn")
