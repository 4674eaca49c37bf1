"""GGUF files with experts and latent attention give transformers' logits, in either layout."""

from __future__ import annotations

import copy

import pytest
import torch

from serve_app.core.errors import ConfigError
from serve_app.models.config import UnsupportedArchitectureError
from serve_app.models.gguf import GGUFFile
from serve_app.models.gguf_config import config_from_gguf
from serve_app.models.loading.loader import load_model
from tests.unit.models.loading.sparse_gguf import write_sparse

pytestmark = pytest.mark.usefixtures("reference_kernels")


def logits_of(model, ids):
    return model(torch.tensor([ids])).logits[0]


@pytest.mark.parametrize(
    ("family", "kind", "options"),
    [
        ("deepseek-v2-lite", "F32", {}),
        ("deepseek-v2-lite", "Q8_0", {"splits_up": True}),
        ("deepseek-v2", "F32", {"splits_up": True}),
        ("deepseek-v3", "F32", {}),
        ("deepseek-v3", "Q4_0", {"splits_up": True, "num_extra": 1}),
        ("qwen3-moe", "Q4_1", {}),
        ("qwen2-moe", "Q8_0", {}),
    ],
)
def test_logits_equal_transformers_on_the_rounded_weights(
    family, kind, options, tmp_path, references, paged_runner, prompt
):
    model = copy.deepcopy(references(family))
    path = tmp_path / "m.gguf"
    model.load_state_dict(write_sparse(path, model, kind, **options))
    ids = prompt(40)

    loaded = load_model(path, dtype="float32", weight_format="dense")
    logits = paged_runner(loaded.network).prefill("a", ids)

    assert (logits - logits_of(model, ids)).abs().max() < 1e-4
    assert loaded.architecture == model.config.model_type


def test_experts_stay_packed(tmp_path, references, paged_runner, prompt):
    path = tmp_path / "m.gguf"
    write_sparse(path, references("qwen3-moe"), "Q4_0")
    packed = load_model(path, dtype="bfloat16")
    assert packed.weight_format == "int4"
    logits = [
        paged_runner(loaded.network).prefill("a", prompt(30))
        for loaded in (packed, load_model(path, dtype="float32"))
    ]
    assert (logits[0] - logits[1]).norm() < 0.1 * logits[1].norm()


DEEPSEEK = {
    "general.architecture": "deepseek2",
    "deepseek2.context_length": 163840,
    "deepseek2.embedding_length": 7168,
    "deepseek2.block_count": 61,
    "deepseek2.feed_forward_length": 18432,
    "deepseek2.attention.head_count": 128,
    "deepseek2.attention.head_count_kv": 128,
    "deepseek2.attention.key_length": 192,
    "deepseek2.attention.value_length": 128,
    "deepseek2.attention.kv_lora_rank": 512,
    "deepseek2.attention.q_lora_rank": 1536,
    "deepseek2.rope.dimension_count": 64,
    "deepseek2.rope.scaling.type": "yarn",
    "deepseek2.rope.scaling.factor": 40.0,
    "deepseek2.rope.scaling.original_context_length": 4096,
    "deepseek2.rope.scaling.yarn_log_multiplier": 0.10000000149011612,
    "deepseek2.leading_dense_block_count": 3,
    "deepseek2.expert_count": 256,
    "deepseek2.expert_used_count": 8,
    "deepseek2.expert_shared_count": 1,
    "deepseek2.expert_feed_forward_length": 2048,
    "deepseek2.expert_weights_scale": 2.5,
    "deepseek2.expert_weights_norm": True,
    "deepseek2.expert_gating_func": 2,
}
"""DeepSeek-R1's, of before the expert groups were stated."""


def test_the_groups_of_an_older_r1_file_are_known():
    config = config_from_gguf(DEEPSEEK, 129280, frozenset({"output.weight"}))
    assert config.architecture == "deepseek_v3"
    assert config.latent is not None
    assert config.latent.cached_dim == 576
    assert (config.head_dim, config.num_kv_heads, config.max_position) == (192, 128, 163840)
    mixture = config.mixture
    assert mixture is not None
    assert (mixture.num_groups, mixture.num_active_groups) == (8, 4)
    assert (mixture.shared_size, sum(mixture.is_sparse)) == (2048, 58)
    assert config.rope_scaling is not None
    assert config.rope_scaling.mscale_all_dim == 1.0


def test_a_trait_that_no_deepseek_has_is_refused():
    changes = {"deepseek2.expert_gating_func": 1}
    with pytest.raises(UnsupportedArchitectureError, match="normalised expert weights"):
        config_from_gguf(DEEPSEEK | changes, 129280, frozenset())


def test_half_of_a_split_projection_is_missing(tmp_path, references):
    path = tmp_path / "m.gguf"
    write_sparse(path, references("deepseek-v2-lite"), splits_up=True)
    path.write_bytes(path.read_bytes().replace(b"blk.1.attn_v_b.weight", b"blk.1.attn_w_b.weight"))
    assert "blk.1.attn_w_b.weight" in GGUFFile(path).tensors
    with pytest.raises(ConfigError, match=r"lacks model\.layers\.1\.self_attn\.kv_b_proj\.weight"):
        load_model(path)
