"""Shapes of latent attention (MLA) and of expert layers, read from config.json or from GGUF.

MLA and shared experts: DeepSeek-V2 (2405.04434); sigmoid scores with a correction bias: DeepSeek-V3
(2412.19437).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from serve_app.core.errors import ConfigError
from serve_app.models.config_errors import required, unsupported

DEEPSEEK = ("deepseek_v2", "deepseek_v3")
SPARSE_QWEN = ("qwen2_moe", "qwen3_moe")


@dataclass(frozen=True, slots=True)
class LatentConfig:
    """Multi-head latent attention: keys and values of all heads come from one vector per token.

    `q_lora_rank` is None where queries are projected directly. `is_interleaved`: the checkpoint's
    rotary rows come in neighbouring pairs instead of two halves.
    """

    q_lora_rank: int | None
    kv_lora_rank: int
    nope_head_dim: int
    rope_head_dim: int
    value_head_dim: int
    is_interleaved: bool = True

    @property
    def cached_dim(self) -> int:
        """Values that a token keeps per layer: the latent and the one rotated key."""
        return self.kv_lora_rank + self.rope_head_dim


@dataclass(frozen=True, slots=True)
class MixtureConfig:
    """Expert layers. Sizes count elements; `intermediate_size` is one expert's.

    A row goes to `num_active` of `num_experts`, chosen among the best `num_active_groups` of
    `num_groups` equal groups. A group's score is its best expert's (`max`), or its best two's sum.
    `is_sparse` tells for each layer whether it has experts or a plain MLP.
    """

    num_experts: int
    num_active: int
    intermediate_size: int
    is_sparse: tuple[bool, ...]
    shared_size: int = 0
    has_shared_gate: bool = False
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    has_correction_bias: bool = False
    num_groups: int = 1
    num_active_groups: int = 1
    group_score: Literal["max", "top2"] = "max"
    is_normalized: bool = False
    scale: float = 1.0

    def __post_init__(self) -> None:
        per_group = self.num_experts // max(1, self.num_groups)
        if (
            not 1 <= self.num_active <= per_group * self.num_active_groups
            or self.num_experts != per_group * self.num_groups
            or not 1 <= self.num_active_groups <= self.num_groups
            or (self.group_score == "top2" and per_group < 2)
        ):
            raise ConfigError(
                f"model.path: {self.num_active} of {self.num_experts} experts in"
                f" {self.num_active_groups} of {self.num_groups} groups cannot be chosen",
                param="model.path",
            )


def read_latent(values: Mapping[str, Any], architecture: str) -> LatentConfig | None:
    """MLA's sizes from config.json; None for other attention. Raises ConfigError."""
    if architecture not in DEEPSEEK:
        return None
    if values.get("attention_bias"):
        raise unsupported("latent attention with biases")
    rank = values.get("q_lora_rank")
    return LatentConfig(
        q_lora_rank=None if rank is None else required(values, "q_lora_rank"),
        kv_lora_rank=required(values, "kv_lora_rank"),
        nope_head_dim=required(values, "qk_nope_head_dim"),
        rope_head_dim=required(values, "qk_rope_head_dim"),
        value_head_dim=required(values, "v_head_dim"),
        # V2 always turns neighbouring pairs.
        is_interleaved=architecture == "deepseek_v2" or bool(values.get("rope_interleave", True)),
    )


def read_mixture(values: Mapping[str, Any], architecture: str) -> MixtureConfig | None:
    """Expert layers from config.json; None for a dense network. Raises ConfigError."""
    if architecture in DEEPSEEK:
        return _deepseek(values, architecture)
    return _qwen(values, architecture) if architecture in SPARSE_QWEN else None


def num_extra_layers(values: Mapping[str, Any], architecture: str) -> int:
    """Layers after the last that predict further tokens (MTP), which decoding does not need."""
    name = "num_nextn_predict_layers"
    return int(values.get(name, 1) or 0) if architecture == "deepseek_v3" else 0


def _deepseek(values: Mapping[str, Any], architecture: str) -> MixtureConfig:
    is_v3 = architecture == "deepseek_v3"
    method = values.get("topk_method", "noaux_tc" if is_v3 else "greedy")
    known = ("noaux_tc",) if is_v3 else ("greedy", "group_limited_greedy")
    if method not in known:
        raise unsupported(f"topk_method {method!r} for {architecture}")
    scoring = values.get("scoring_func", "sigmoid" if is_v3 else "softmax")
    if scoring != ("sigmoid" if is_v3 else "softmax"):
        raise unsupported(f"scoring_func {scoring!r} for {architecture}")
    if values.get("moe_layer_freq", 1) != 1:
        raise unsupported("expert layers at intervals (moe_layer_freq) for DeepSeek")
    is_normalized = bool(values.get("norm_topk_prob", is_v3))
    if is_normalized and not is_v3:
        # transformers ignores it, the authors' code drops the scaling factor: no model has it.
        raise unsupported("norm_topk_prob for deepseek_v2")
    has_groups = method != "greedy"
    size = required(values, "moe_intermediate_size")
    num_dense = values.get("first_k_dense_replace") or 0
    return MixtureConfig(
        num_experts=required(values, "n_routed_experts"),
        num_active=required(values, "num_experts_per_tok"),
        intermediate_size=size,
        is_sparse=tuple(i >= num_dense for i in range(required(values, "num_hidden_layers"))),
        shared_size=size * (values.get("n_shared_experts") or 0),
        scoring="sigmoid" if is_v3 else "softmax",
        has_correction_bias=is_v3,
        num_groups=required(values, "n_group") if has_groups else 1,
        num_active_groups=required(values, "topk_group") if has_groups else 1,
        group_score="top2" if is_v3 else "max",
        is_normalized=is_normalized,
        scale=float(values.get("routed_scaling_factor", 2.5 if is_v3 else 1.0)),
    )


def _qwen(values: Mapping[str, Any], architecture: str) -> MixtureConfig | None:
    # transformers 5 writes Qwen3's under another name than 4 did.
    has_new_name = "num_local_experts" in values
    num_experts = required(values, "num_local_experts" if has_new_name else "num_experts")
    step = values.get("decoder_sparse_step") or 1
    dense = set(values.get("mlp_only_layers") or ())
    is_sparse = tuple(
        i not in dense and (i + 1) % step == 0 for i in range(required(values, "num_hidden_layers"))
    )
    if num_experts == 0 or not any(is_sparse):
        return None
    is_v2 = architecture == "qwen2_moe"
    return MixtureConfig(
        num_experts=num_experts,
        num_active=required(values, "num_experts_per_tok"),
        intermediate_size=required(values, "moe_intermediate_size"),
        is_sparse=is_sparse,
        shared_size=required(values, "shared_expert_intermediate_size") if is_v2 else 0,
        has_shared_gate=is_v2,
        is_normalized=bool(values.get("norm_topk_prob", False)),
    )
