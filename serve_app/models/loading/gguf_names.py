"""Names of GGUF tensors, and the transformers names of the same weights."""

from __future__ import annotations

import re

from serve_app.models.loading.source import EMBEDDING, FINAL_NORM, HEAD

_TOP = {"token_embd.weight": EMBEDDING, "output_norm.weight": FINAL_NORM, "output.weight": HEAD}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
}
_SHARED = re.compile(r"ffn_(gate|up|down)_shexp")
_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_EXPERTS = re.compile(r"blk\.(\d+)\.ffn_(gate|up|down)_exps\.weight")
_SPLIT_UP = re.compile(r"blk\.(\d+)\.attn_([kv])_b\.weight")


def canonical_name(name: str, shared_prefix: str = "mlp.shared_experts.") -> str:
    """The transformers name of a GGUF tensor; an unknown name stays as it is."""
    if name in _TOP:
        return _TOP[name]
    match = _BLOCK.fullmatch(name)
    if match is None:
        return name
    index, part, kind = match.groups()
    prefix = f"model.layers.{index}."
    if part == "exp_probs_b":
        return f"{prefix}mlp.gate.e_score_correction_bias"
    if shared := _SHARED.fullmatch(part):
        return f"{prefix}{shared_prefix}{shared.group(1)}_proj.{kind}"
    return f"{prefix}{_LAYER[part]}.{kind}" if part in _LAYER else name


def expert_name(name: str, expert: int) -> str | None:
    """The transformers name of one expert's part of a stacked tensor, or None for other tensors."""
    match = _EXPERTS.fullmatch(name)
    if match is None:
        return None
    index, part = match.groups()
    return f"model.layers.{index}.mlp.experts.{expert}.{part}_proj.weight"


def split_up_name(name: str) -> str | None:
    """The name of the `kv_b_proj` that a k_b or v_b tensor is half of; None for other tensors."""
    match = _SPLIT_UP.fullmatch(name)
    return f"model.layers.{match.group(1)}.self_attn.kv_b_proj.weight" if match else None


def layer_of(name: str) -> int | None:
    """The layer that a GGUF tensor belongs to, None where to none."""
    match = re.match(r"blk\.(\d+)\.", name)
    return int(match.group(1)) if match else None
