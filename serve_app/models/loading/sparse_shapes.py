"""Weights of latent attention and of expert layers, by transformers' names."""

from __future__ import annotations

from serve_app.models.config import NetworkConfig

Shapes = dict[str, tuple[int, ...]]


def latent_attention_shapes(config: NetworkConfig) -> Shapes:
    """The attention weights of one layer with `config.latent`."""
    latent = config.latent
    assert latent is not None, "only for latent attention"
    hidden, heads, rank = config.hidden_size, config.num_heads, latent.kv_lora_rank
    query = heads * config.head_dim
    shapes: Shapes = {
        "self_attn.kv_a_proj_with_mqa.weight": (latent.cached_dim, hidden),
        "self_attn.kv_a_layernorm.weight": (rank,),
        "self_attn.kv_b_proj.weight": (
            heads * (latent.nope_head_dim + latent.value_head_dim),
            rank,
        ),
        "self_attn.o_proj.weight": (hidden, heads * latent.value_head_dim),
    }
    if latent.q_lora_rank is None:
        return shapes | {"self_attn.q_proj.weight": (query, hidden)}
    return shapes | {
        "self_attn.q_a_proj.weight": (latent.q_lora_rank, hidden),
        "self_attn.q_a_layernorm.weight": (latent.q_lora_rank,),
        "self_attn.q_b_proj.weight": (query, latent.q_lora_rank),
    }


def mixture_shapes(config: NetworkConfig) -> Shapes:
    """The MLP weights of one layer with experts."""
    mixture = config.mixture
    assert mixture is not None, "only for mixtures"
    hidden, inner = config.hidden_size, mixture.intermediate_size
    shapes: Shapes = {"mlp.gate.weight": (mixture.num_experts, hidden)}
    for expert in range(mixture.num_experts):
        shapes |= mlp_shapes(f"mlp.experts.{expert}.", hidden, inner)
    if mixture.has_correction_bias:
        shapes["mlp.gate.e_score_correction_bias"] = (mixture.num_experts,)
    if mixture.shared_size:
        shapes |= mlp_shapes(shared_prefix(config), hidden, mixture.shared_size)
    if mixture.has_shared_gate:
        shapes["mlp.shared_expert_gate.weight"] = (1, hidden)
    return shapes


def mlp_shapes(prefix: str, hidden: int, inner: int) -> Shapes:
    """gate, up and down of one MLP."""
    return {
        prefix + "gate_proj.weight": (inner, hidden),
        prefix + "up_proj.weight": (inner, hidden),
        prefix + "down_proj.weight": (hidden, inner),
    }


def shared_prefix(config: NetworkConfig) -> str:
    """Where the shared experts' weights are: Qwen2 has one, DeepSeek several in one."""
    mixture = config.mixture
    has_gate = mixture is not None and mixture.has_shared_gate
    return "mlp.shared_expert." if has_gate else "mlp.shared_experts."
