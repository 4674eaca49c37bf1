"""The networks that `xeray bench decode` builds from random weights, by name."""

from __future__ import annotations

from serve_app.models.config import NetworkConfig
from serve_app.models.sparse_config import LatentConfig, MixtureConfig

SHAPES = {
    "qwen2-7b": NetworkConfig(
        architecture="qwen2",
        hidden_size=3584,
        num_layers=28,
        num_heads=28,
        num_kv_heads=4,
        head_dim=128,
        intermediate_size=18944,
        vocab_size=152064,
        max_position=32768,
        rope_theta=1e6,
        rope_dim=128,
        qkv_bias=True,
    ),
    "qwen2-1.5b": NetworkConfig(
        architecture="qwen2",
        hidden_size=1536,
        num_layers=28,
        num_heads=12,
        num_kv_heads=2,
        head_dim=128,
        intermediate_size=8960,
        vocab_size=151936,
        max_position=32768,
        rope_theta=1e6,
        rope_dim=128,
        tie_embeddings=True,
        qkv_bias=True,
    ),
    "smollm2-135m": NetworkConfig(
        architecture="llama",
        hidden_size=576,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        intermediate_size=1536,
        vocab_size=49152,
        max_position=8192,
        rope_theta=1e5,
        rope_dim=64,
        tie_embeddings=True,
    ),
    "deepseek-v2-lite": NetworkConfig(
        architecture="deepseek_v2",
        hidden_size=2048,
        num_layers=27,
        num_heads=16,
        num_kv_heads=16,
        head_dim=192,
        intermediate_size=10944,
        vocab_size=102400,
        max_position=163840,
        rope_dim=64,
        latent=LatentConfig(None, 512, 128, 64, 128),
        mixture=MixtureConfig(64, 6, 1408, (False, *[True] * 26), shared_size=2816),
    ),
}
