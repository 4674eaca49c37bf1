"""Writes a tiny sparse transformers model as GGUF, as llama.cpp's converter lays it out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

PREFIXES = {
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
}
NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.kv_b_proj": "attn_kv_b",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    **{f"mlp.shared_expert{s}.{p}_proj": f"ffn_{p}_shexp" for s in ("", "s") for p in
       ("gate", "up", "down")},
}  # fmt: skip
TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def write_sparse(
    path: Path, model: Any, kind: str = "F32", *, splits_up: bool = False, num_extra: int = 0
) -> dict[str, torch.Tensor]:
    """Write `model`, experts and shared experts in `kind`; returns the rounded state dict.

    splits_up: newer files hold k_b and v_b, and the absorbed head sizes, instead of kv_b.
    num_extra: layers after the last, which predict further tokens.
    """
    config = model.config
    prefix = PREFIXES[config.model_type]
    writer = gguf.GGUFWriter(path, prefix)
    for key, value in metadata(config, splits_up, num_extra).items():
        add = {bool: writer.add_bool, float: writer.add_float32, str: writer.add_string}
        add.get(type(value), writer.add_uint32)(f"{prefix}.{key}", value)
    rounded = {}
    for name, parameter in model.state_dict().items():
        is_rounded = "experts" in name or "shared_expert." in name
        tensors = named(name, parameter.float().numpy(), config, splits_up)
        for gguf_name, values in tensors.items():
            add_tensor(writer, gguf_name, values, kind if is_rounded else "F32")
        rounded[name] = torch.from_numpy(
            round_trip(parameter.float().numpy(), kind if is_rounded else "F32")
        )
    for layer in range(config.num_hidden_layers, config.num_hidden_layers + num_extra):
        for part in ("attn_norm.weight", "nextn.eh_proj.weight"):
            writer.add_tensor(f"blk.{layer}.{part}", np.ones((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return rounded


def round_trip(values: np.ndarray, kind: str) -> np.ndarray:
    quantization = gguf.GGMLQuantizationType[kind]
    return gguf.dequantize(gguf.quantize(values, quantization), quantization).copy()


def add_tensor(writer: gguf.GGUFWriter, name: str, values: np.ndarray, kind: str) -> None:
    quantization = gguf.GGMLQuantizationType[kind]
    raw = None if kind == "F32" else quantization
    writer.add_tensor(
        name, gguf.quantize(np.ascontiguousarray(values), quantization), raw_dtype=raw
    )


def named(name: str, values: np.ndarray, config: Any, splits_up: bool) -> dict[str, np.ndarray]:
    """The GGUF tensors that hold one weight of the state dict."""
    if name in TOP:
        return {TOP[name]: values}
    _, _, index, rest = name.split(".", 3)
    block = f"blk.{index}."
    if rest == "mlp.gate.e_score_correction_bias":
        return {block + "exp_probs_b.bias": values}
    if rest == "mlp.experts.gate_up_proj":
        gate, up = np.split(values, 2, axis=1)
        return {block + "ffn_gate_exps.weight": gate, block + "ffn_up_exps.weight": up}
    if rest == "mlp.experts.down_proj":
        return {block + "ffn_down_exps.weight": values}
    stem, _, kind = rest.rpartition(".")
    if stem == "self_attn.kv_b_proj" and splits_up:
        nope = config.qk_nope_head_dim
        heads = values.reshape(config.num_attention_heads, -1, values.shape[-1])
        key = heads[:, :nope].transpose(0, 2, 1)
        return {block + "attn_k_b.weight": key, block + "attn_v_b.weight": heads[:, nope:]}
    if stem == "mlp.shared_expert_gate":
        values = values.reshape(-1)
    return {f"{block}{NAMES[stem]}.{kind}": values}


def metadata(config: Any, splits_up: bool, num_extra: int) -> dict[str, Any]:
    values: dict[str, Any] = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers + num_extra,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "expert_used_count": config.num_experts_per_tok,
        "expert_feed_forward_length": config.moe_intermediate_size,
    }
    if config.model_type.startswith("deepseek"):
        return values | deepseek_metadata(config, splits_up, num_extra)
    if config.model_type == "qwen2_moe":
        values["expert_shared_feed_forward_length"] = config.shared_expert_intermediate_size
    else:
        values |= {f"attention.{name}_length": config.head_dim for name in ("key", "value")}
    return values | {"expert_count": config.num_experts}


def deepseek_metadata(config: Any, splits_up: bool, num_extra: int) -> dict[str, Any]:
    is_v3 = config.model_type == "deepseek_v3"
    rope_dim, rank = config.qk_rope_head_dim, config.kv_lora_rank
    key, value = config.qk_nope_head_dim + rope_dim, config.v_head_dim
    values = {
        "attention.kv_lora_rank": rank,
        "attention.key_length": rank + rope_dim if splits_up else key,
        "attention.value_length": rank if splits_up else value,
        "rope.dimension_count": rope_dim,
        "leading_dense_block_count": config.first_k_dense_replace,
        "expert_count": config.n_routed_experts,
        "expert_shared_count": config.n_shared_experts,
        "expert_weights_scale": float(config.routed_scaling_factor),
        "expert_weights_norm": bool(config.norm_topk_prob),
        "expert_gating_func": 2 if is_v3 else 1,
    }
    if splits_up:
        values |= {
            "attention.key_length_mla": key,
            "attention.value_length_mla": value,
            "attention.head_count_kv": 1,
        }
    if config.q_lora_rank:
        values["attention.q_lora_rank"] = config.q_lora_rank
    if num_extra:
        values["nextn_predict_layers"] = num_extra
    if is_v3 or config.topk_method == "group_limited_greedy":
        values |= {
            "expert_group_count": config.n_group,
            "expert_group_used_count": config.topk_group,
        }
    rope = config.rope_parameters
    if rope["rope_type"] == "yarn":
        values |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(rope["factor"]),
            "rope.scaling.original_context_length": rope["original_max_position_embeddings"],
            "rope.scaling.yarn_log_multiplier": 0.1 * rope["mscale_all_dim"],
        }
    return values
