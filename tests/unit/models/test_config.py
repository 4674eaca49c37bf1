from __future__ import annotations

import pytest

from serve_app.core.errors import ConfigError
from serve_app.models.config import (
    UnsupportedArchitectureError,
    config_from_hugging_face,
)
from serve_app.models.gguf_config import config_from_gguf

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 100,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}
GGUF = {
    "general.architecture": "llama",
    "llama.context_length": 8192,
    "llama.embedding_length": 64,
    "llama.block_count": 2,
    "llama.feed_forward_length": 96,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 9.999999747378752e-06,
    "llama.rope.freq_base": 500000.0,
}


def test_both_styles_of_transformers():
    scaling = {"rope_type": "linear", "factor": 2.0}
    old = config_from_hugging_face(LLAMA | {"rope_theta": 5e5, "rope_scaling": scaling})
    new = config_from_hugging_face(LLAMA | {"rope_parameters": scaling | {"rope_theta": 5e5}})
    oldest = config_from_hugging_face(
        LLAMA | {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}
    )
    assert old == new == oldest
    assert (old.rope_theta, old.rope_scaling.kind, old.max_position) == (5e5, "linear", 256)
    assert (old.head_dim, old.rope_dim, old.num_kv_heads) == (16, 16, 2)


def test_default_rope_has_no_scaling():
    for rope in (None, {"rope_type": "default", "rope_theta": 1e4}):
        config = config_from_hugging_face(LLAMA | {"rope_parameters": rope})
        assert config.rope_scaling is None
        assert config.max_position == 128


def test_yarn_of_a_qwen_model_card_stretches_the_context():
    rope = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    assert config_from_hugging_face(LLAMA | {"rope_scaling": rope}).max_position == 512


@pytest.mark.parametrize(
    ("model_type", "qkv_bias", "qk_norm"),
    [
        ("llama", False, False),
        ("mistral", False, False),
        ("qwen2", True, False),
        ("qwen3", False, True),
    ],
)
def test_families(model_type, qkv_bias, qk_norm):
    config = config_from_hugging_face(LLAMA | {"model_type": model_type})
    assert (config.qkv_bias, config.qk_norm) == (qkv_bias, qk_norm)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "gpt_neox"}, "gpt_neox"),
        ({"model_type": None}, "None"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"model_type": "mistral", "sliding_window": 64}, "sliding-window"),
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 64}, "sliding"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "bitsandbytes"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "rotary size 8"),
    ],
)
def test_what_another_engine_must_run(changes, named):
    with pytest.raises(UnsupportedArchitectureError, match=named) as error:
        config_from_hugging_face(LLAMA | changes)
    assert "engine.kind: transformers" in str(error.value)


def test_qwen2_with_its_window_switched_off_is_fine():
    changes = {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 64}
    assert config_from_hugging_face(LLAMA | changes).architecture == "qwen2"


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": None},
        {"num_hidden_layers": "2"},
        {"vocab_size": 0},
        {"num_key_value_heads": 3},
    ],
)
def test_nonsense_is_a_config_error(changes):
    with pytest.raises(ConfigError) as error:
        config_from_hugging_face(LLAMA | changes)
    assert not isinstance(error.value, UnsupportedArchitectureError)


def test_gguf():
    config = config_from_gguf(GGUF, 100, frozenset({"blk.0.attn_q.bias"}))
    assert (config.vocab_size, config.head_dim, config.rms_eps) == (100, 16, 1e-5)
    assert (config.tie_embeddings, config.qkv_bias, config.rope_theta) == (True, True, 5e5)
    assert not config_from_gguf(GGUF, 100, frozenset({"output.weight"})).tie_embeddings


def test_gguf_scaling():
    scaling = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}
    config = config_from_gguf(GGUF | scaling, 100, frozenset())
    assert (config.rope_scaling.kind, config.rope_scaling.factor) == ("linear", 2.0)
    assert config.max_position == 8192


@pytest.mark.parametrize(
    "changes",
    [
        {"general.architecture": "gemma3"},
        {"llama.expert_count": 8},
        {"llama.rope.scaling.type": "longrope"},
        {"llama.attention.value_length": 8},
        {"llama.attention.head_count_kv": [2, 1]},
    ],
)
def test_gguf_that_another_engine_must_run(changes):
    with pytest.raises(UnsupportedArchitectureError):
        config_from_gguf(GGUF | changes, 100, frozenset())


def test_gguf_without_a_key():
    metadata = {key: value for key, value in GGUF.items() if key != "llama.block_count"}
    with pytest.raises(ConfigError, match=r"llama\.block_count"):
        config_from_gguf(metadata, 100, frozenset())
