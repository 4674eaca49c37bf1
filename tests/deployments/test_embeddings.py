"""A model for embeddings through the whole graph: tokenised, pooled in the engine, answered."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

HIDDEN, INNER, HEADS, HEAD_DIM, LAYERS, VOCAB = 32, 48, 2, 16, 1, 256
CONFIG = {
    "model_type": "qwen3",
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "head_dim": HEAD_DIM,
    "vocab_size": VOCAB,
    "max_position_embeddings": 128,
    "matryoshka_dimensions": [8, 16],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Qwen3 as its embedding models are saved, made without torch."""
    folder = tmp_path_factory.mktemp("embedding")
    rng = np.random.default_rng(4)
    shapes = {
        "q_proj": (HIDDEN, HIDDEN), "k_proj": (HIDDEN, HIDDEN), "v_proj": (HIDDEN, HIDDEN),
        "o_proj": (HIDDEN, HIDDEN), "gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN),
        "down_proj": (HIDDEN, INNER),
    }  # fmt: skip
    weights = {
        "embed_tokens.weight": rng.normal(size=(VOCAB, HIDDEN)),
        "norm.weight": np.ones(HIDDEN),
    }
    for name, shape in shapes.items():
        part = "self_attn" if name[1] == "_" else "mlp"
        weights[f"layers.0.{part}.{name}.weight"] = rng.normal(size=shape) * 0.2
    for name in ("input_layernorm", "post_attention_layernorm"):
        weights[f"layers.0.{name}.weight"] = np.ones(HIDDEN)
    for name in ("q_norm", "k_norm"):
        weights[f"layers.0.self_attn.{name}.weight"] = np.ones(HEAD_DIM)
    tensors = {name: np.ascontiguousarray(value, np.float32) for name, value in weights.items()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    modules = [
        {"type": f"sentence_transformers.models.{kind}", "path": path}
        for kind, path in (("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_N"))
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({text: i for i, text in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_texts_become_vectors_over_http(deployed: Callable[..., Any], folder: Path) -> None:
    engine = {
        "fixed_rate_tokens_per_s": None, "kv_cache_tokens": 1024, "dtype": "float32",
        "device": "cpu", "num_threads": 1, "watchdog_min_s": 20.0,
    }  # fmt: skip
    app = deployed({"model": {"path": str(folder), "aliases": ["*"]}, "engine": engine})
    assert app.one("ModelReplica", "info").engine == "embedding"
    listed = httpx.get(f"{app.url}/v1/models", timeout=10).json()["data"][0]
    assert listed["capabilities"] == ["embeddings"]
    url = f"{app.url}/v1/embeddings"

    many = httpx.post(url, json={"input": ["a cat", "a dog"] * 20}, timeout=30).json()
    alone = httpx.post(url, json={"input": "a cat", "dimensions": 8}, timeout=60).json()

    vectors = np.array([entry["embedding"] for entry in many["data"]])
    assert vectors.shape == (40, HIDDEN)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, rtol=1e-5)
    np.testing.assert_allclose(vectors[2::2], vectors[:1].repeat(19, 0), atol=1e-5)
    assert vectors[0] @ vectors[1] < 0.999, "two texts, two vectors"
    first = vectors[0][:8] / np.linalg.norm(vectors[0][:8])
    np.testing.assert_allclose(alone["data"][0]["embedding"], first, atol=1e-5)
    assert many["usage"] == {"prompt_tokens": 200, "total_tokens": 200}
    refused = app.chat()
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "model")
    app.wait_states(
        "ModelReplica",
        lambda s: s and (s[0].num_running, s[0].num_used_blocks) == (0, 0),
        method="stats",
    )
