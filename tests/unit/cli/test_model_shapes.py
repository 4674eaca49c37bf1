from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from serve_app.cli.model_shapes import KNOWN_SHAPES, read_model
from serve_app.core.errors import ConfigError
from serve_app.hardware.memory import kv_bytes_per_token

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}


def folder(tmp_path: Path, **changes: Any) -> str:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | changes))
    return str(tmp_path)


def test_a_hugging_face_folder(tmp_path: Path) -> None:
    facts = read_model(folder(tmp_path))

    assert facts.stored_format == "dense"
    assert facts.shape.name == tmp_path.name
    assert (facts.shape.num_layers, facts.shape.num_heads, facts.shape.num_kv_heads) == (3, 4, 2)
    assert facts.shape.head_dim == 16
    assert facts.shape.is_tied


@pytest.mark.parametrize(
    ("quantization", "stored"),
    [
        ({"quant_method": "auto-round", "bits": 4}, "int4"),
        ({"bits": 8}, "int8"),
        ({"config_groups": {"g": {"weights": {"type": "int", "num_bits": 4}}}}, "int4"),
        ({"config_groups": {"g": {"weights": {"type": "float", "num_bits": 8}}}}, "dense"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "dense"),
        ({}, "dense"),
    ],
)
def test_quantized_folders(tmp_path: Path, quantization: dict[str, Any], stored: str) -> None:
    assert read_model(folder(tmp_path, quantization_config=quantization)).stored_format == stored


def test_experts(tmp_path: Path) -> None:
    shape = read_model(folder(tmp_path, num_experts=8, moe_intermediate_size=32)).shape

    assert (shape.num_experts, shape.intermediate_size) == (8, 32)


def test_a_config_without_sizes_names_the_first_missing(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")

    with pytest.raises(ConfigError, match="does not tell hidden_size"):
        read_model(str(tmp_path))


@pytest.mark.parametrize("text", ["", "[1]", "{"])
def test_a_damaged_config_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)

    with pytest.raises(ConfigError, match=r"config\.json"):
        read_model(str(tmp_path))


V2_LITE = {
    "model_type": "deepseek_v2",
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "vocab_size": 102400,
    "max_position_embeddings": 163840,
    "tie_word_embeddings": False,
}


def test_latent_attention_keeps_576_values_per_token_and_layer(tmp_path: Path) -> None:
    shape = read_model(folder(tmp_path, **V2_LITE)).shape

    assert kv_bytes_per_token(shape, "bfloat16") == 576 * 27 * 2
    assert replace(shape, name="deepseek-v2-lite") == KNOWN_SHAPES["deepseek-v2-lite"]


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("deepseek-v2-lite", 15.7),
        ("deepseek-v2", 235.7),
        ("deepseek-v3", 671.0),
        ("deepseek-r1", 671.0),
        ("qwen3-30b-a3b", 30.5),
    ],
)
def test_sparse_shapes_have_their_published_size(name: str, billions: float) -> None:
    assert KNOWN_SHAPES[name].num_params / 1e9 == pytest.approx(billions, rel=0.005)


def test_layers_without_experts_count_as_such(tmp_path: Path) -> None:
    sizes = {"num_experts": 8, "moe_intermediate_size": 32, "mlp_only_layers": [0]}
    shape = read_model(folder(tmp_path, **sizes)).shape

    assert (shape.num_dense_layers, shape.dense_intermediate_size) == (1, 128)


@pytest.mark.parametrize(
    ("raw_type", "stored"),
    [(gguf.GGMLQuantizationType.Q8_0, "int8"), (gguf.GGMLQuantizationType.F16, "dense")],
)
def test_a_gguf_file(tmp_path: Path, raw_type: gguf.GGMLQuantizationType, stored: str) -> None:
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_block_count(1)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(128)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_context_length(256)
    for name in ("token_embd.weight", "blk.0.attn_q.weight", "output.weight"):
        values = np.ones((64, 64), np.float32)
        writer.add_tensor(name, gguf.quantize(values, raw_type), raw_dtype=raw_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    facts = read_model(str(path))

    assert facts.stored_format == stored
    assert facts.shape.vocab_size == 64
    assert facts.shape.head_dim == 16
    assert not facts.shape.is_tied


def test_the_embedded_model() -> None:
    facts = read_model("embedded")

    assert facts.stored_format == "int4"
    assert (facts.shape.num_layers, facts.shape.hidden_size) == (30, 576)
    assert facts.shape.num_params == pytest.approx(134.5e6, rel=0.001)


def test_known_shapes_have_the_size_in_their_name() -> None:
    for name, shape in KNOWN_SHAPES.items():
        size = re.search(r"-([\d.]+)b(-|$)", name)
        assert read_model(name.upper()).shape is shape
        if size is None:  # named by version
            continue
        billions = float(size.group(1))
        assert shape.num_params / 1e9 == pytest.approx(billions, rel=0.2), name
