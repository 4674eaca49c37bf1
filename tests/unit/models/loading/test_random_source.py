from __future__ import annotations

import torch

from serve_app.models.config import NetworkConfig
from serve_app.models.interface import AttentionMetadata, PrefillChunk
from serve_app.models.loading.random_source import RandomSource, make_random_model

CONFIG = NetworkConfig(
    architecture="qwen2",
    hidden_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=96,
    vocab_size=320,
    max_position=128,
    rope_dim=16,
    qkv_bias=True,
)


def test_a_weight_depends_on_its_name_and_the_seed(device):
    name = "model.layers.1.mlp.up_proj.weight"
    first, again, other = (
        RandomSource(CONFIG, torch.device(device), torch.float32, seed).read(name)
        for seed in (0, 0, 1)
    )
    assert first.shape == (96, 64)
    assert first.device.type == device
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert 0.018 < float(first.std()) < 0.022


def test_norms_are_ones():
    source = RandomSource(CONFIG, torch.device("cpu"), torch.float32)
    assert torch.equal(source.read("model.norm.weight"), torch.ones(64))
    assert source.total_bytes == sum(source.nbytes(name) for name in source.names())


def test_the_network_runs_dense_and_packed(device):
    target = torch.device(device)
    for weight_format in ("auto", "int4"):
        model = make_random_model(CONFIG, device=target, weight_format=weight_format)
        assert model.weight_format == ("dense" if weight_format == "auto" else "int4")
        cache = model.network.allocate_kv_cache(4, 16)
        rows = torch.arange(8, device=target)
        nothing = torch.empty(0, dtype=torch.int64, device=target)
        metadata = AttentionMetadata(
            num_decodes=0,
            slot_mapping=16 + rows,
            decode_block_tables=nothing.view(0, 0),
            decode_context_lens=nothing,
            max_decode_context_len=1,
            prefill_chunks=(PrefillChunk(0, 8, 8, torch.tensor([1], device=target)),),
        )
        logits = model.network.compute_logits(model.network.forward(rows, rows, cache, metadata))
        assert logits.shape == (8, 320)
        assert torch.isfinite(logits).all()
