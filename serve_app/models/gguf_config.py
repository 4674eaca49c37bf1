"""NetworkConfig from GGUF metadata.

Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; those of expert layers and of
latent attention as llama.cpp's converter writes them, older files (`attention.key_length`) and
newer ones (`attention.key_length_mla`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from serve_app.core.errors import ConfigError
from serve_app.models.config import NetworkConfig, RopeScaling, stretched
from serve_app.models.config_errors import unsupported
from serve_app.models.sparse_config import LatentConfig, MixtureConfig

_ARCHITECTURES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen2moe": "qwen2_moe",
    "qwen3moe": "qwen3_moe",
    "deepseek2": "deepseek_v2",  # or V3, by its scores
}
"""GGUF's name of an architecture → transformers' `model_type`."""
_SIGMOID = 2
_UNSTATED_GROUPS = {160: (8, 3), 256: (8, 4)}
"""Expert groups, all and active, by the number of experts: DeepSeek-V2's and V3's own, which files
of before `expert_group_count` do not state."""
_YARN_LOG_SCALE = 0.1
"""`rope.scaling.yarn_log_multiplier` is the config's `mscale_all_dim` times this."""


@dataclass(frozen=True, slots=True)
class _Keys:
    """The metadata under an architecture's prefix."""

    metadata: Mapping[str, Any]
    prefix: str

    def get(self, name: str, default: Any = None) -> Any:
        """The value of `name`. Raises ConfigError where it is absent and has no default."""
        value = self.metadata.get(f"{self.prefix}.{name}", default)
        if value is None:
            raise ConfigError(
                f"model.path: the GGUF file lacks {self.prefix}.{name}; convert the model again",
                param="model.path",
            )
        return value


def config_from_gguf(
    metadata: Mapping[str, Any], vocab_size: int, tensor_names: frozenset[str]
) -> NetworkConfig:
    """Read GGUF metadata. `vocab_size` is the number of rows of the embedding.

    What GGUF does not state (tied head, biases) is told by `tensor_names`. Raises
    UnsupportedArchitectureError for a model that this network would compute wrongly.
    """
    prefix = str(metadata.get("general.architecture", ""))
    if prefix not in _ARCHITECTURES:
        raise unsupported(f"architecture {prefix!r}")
    keys = _Keys(metadata, prefix)
    num_heads = keys.get("attention.head_count")
    num_kv_heads = keys.get("attention.head_count_kv", num_heads)
    if not isinstance(num_heads, int) or not isinstance(num_kv_heads, int):
        raise unsupported("head counts that differ by layer")
    hidden_size = keys.get("embedding_length")
    scaling = _scaling(keys)
    config = NetworkConfig(
        architecture=_ARCHITECTURES[prefix],
        hidden_size=hidden_size,
        num_layers=keys.get("block_count"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        intermediate_size=keys.get("feed_forward_length"),
        vocab_size=vocab_size,
        max_position=stretched(keys.get("context_length"), scaling),
        # The file stores float32; 9.999999747378752e-06 was written as 1e-5.
        rms_eps=float(f"{keys.get('attention.layer_norm_rms_epsilon', 1e-6):.6g}"),
        rope_theta=float(keys.get("rope.freq_base", 10000.0)),
        rope_scaling=scaling,
        tie_embeddings="output.weight" not in tensor_names,
        qkv_bias="blk.0.attn_q.bias" in tensor_names,
        output_bias="blk.0.attn_output.bias" in tensor_names,
        mlp_bias="blk.0.ffn_gate.bias" in tensor_names,
        qk_norm="blk.0.attn_q_norm.weight" in tensor_names,
        **_head_sizes(keys, hidden_size // num_heads),
    )
    return _deepseek(config, keys) if prefix == "deepseek2" else _qwen_experts(config, keys)


def _head_sizes(keys: _Keys, default: int) -> dict[str, Any]:
    """`head_dim`, `rope_dim` and `latent` of a NetworkConfig."""
    if keys.prefix == "deepseek2":
        latent = _latent(keys)
        head_dim = latent.nope_head_dim + latent.rope_head_dim
        return {"head_dim": head_dim, "rope_dim": latent.rope_head_dim, "latent": latent}
    head_dim = keys.get("attention.key_length", default)
    if keys.get("attention.value_length", head_dim) != head_dim:
        raise unsupported("values of another size than keys")
    return {"head_dim": head_dim, "rope_dim": keys.get("rope.dimension_count", head_dim)}


def _latent(keys: _Keys) -> LatentConfig:
    rope_head_dim = keys.get("rope.dimension_count")
    # Newer files give the absorbed sizes under the plain names, and the heads' own under these.
    key_length = keys.get("attention.key_length_mla", keys.get("attention.key_length"))
    value_length = keys.get("attention.value_length_mla", keys.get("attention.value_length"))
    return LatentConfig(
        q_lora_rank=keys.get("attention.q_lora_rank", 0) or None,
        kv_lora_rank=keys.get("attention.kv_lora_rank"),
        nope_head_dim=key_length - rope_head_dim,
        rope_head_dim=rope_head_dim,
        value_head_dim=value_length,
    )


def _deepseek(config: NetworkConfig, keys: _Keys) -> NetworkConfig:
    num_extra = keys.get("nextn_predict_layers", 0)
    num_layers = config.num_layers - num_extra
    num_dense = keys.get("leading_dense_block_count", 0)
    num_experts, size = keys.get("expert_count"), keys.get("expert_feed_forward_length")
    is_v3 = keys.get("expert_gating_func", 1) == _SIGMOID
    is_normalized = bool(keys.get("expert_weights_norm", False))
    if is_normalized and not is_v3:
        raise unsupported("normalised expert weights for deepseek_v2")
    groups = _UNSTATED_GROUPS.get(num_experts, (1, 1))
    return replace(
        config,
        architecture="deepseek_v3" if is_v3 else "deepseek_v2",
        num_layers=num_layers,
        num_kv_heads=config.num_heads,
        num_extra_layers=num_extra,
        mixture=MixtureConfig(
            num_experts=num_experts,
            num_active=keys.get("expert_used_count"),
            intermediate_size=size,
            is_sparse=tuple(index >= num_dense for index in range(num_layers)),
            shared_size=size * keys.get("expert_shared_count", 0),
            scoring="sigmoid" if is_v3 else "softmax",
            has_correction_bias=is_v3,
            num_groups=keys.get("expert_group_count", groups[0]),
            num_active_groups=keys.get("expert_group_used_count", groups[1]),
            group_score="top2" if is_v3 else "max",
            is_normalized=is_normalized,
            scale=float(keys.get("expert_weights_scale", 1.0)),
        ),
    )


def _qwen_experts(config: NetworkConfig, keys: _Keys) -> NetworkConfig:
    """The same config with the expert layers of a file that has them."""
    num_experts = keys.get("expert_count", 0)
    if not num_experts:
        return config
    if keys.prefix not in ("qwen2moe", "qwen3moe"):
        raise unsupported(f"mixture of experts in {config.architecture}")
    is_v2 = keys.prefix == "qwen2moe"
    return replace(
        config,
        mixture=MixtureConfig(
            num_experts=num_experts,
            num_active=keys.get("expert_used_count"),
            intermediate_size=keys.get("expert_feed_forward_length"),
            is_sparse=(True,) * config.num_layers,
            shared_size=keys.get("expert_shared_feed_forward_length") if is_v2 else 0,
            has_shared_gate=is_v2,
            is_normalized=not is_v2,  # no key: it goes with the architecture
        ),
    )


def _scaling(keys: _Keys) -> RopeScaling | None:
    # llama3 scaling comes as the tensor rope_freqs.weight instead, which the loader applies.
    kind = keys.get("rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise unsupported(f"rope scaling {kind!r}")
    factor = float(keys.get("rope.scaling.factor"))
    original = keys.get(
        "rope.scaling.original_context_length", int(keys.get("context_length") / factor)
    )
    scaling = RopeScaling(kind, factor, original)
    log_multiplier = keys.get("rope.scaling.yarn_log_multiplier", 0.0)
    if kind == "linear" or not log_multiplier:
        return scaling
    mscale = float(f"{log_multiplier / _YARN_LOG_SCALE:.6g}")
    return replace(scaling, mscale=mscale, mscale_all_dim=mscale)
