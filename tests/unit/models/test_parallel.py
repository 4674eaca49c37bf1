"""Shards of a network, in threads that sum over ranks, against the whole network."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from serve_app.core.errors import ConfigError
from serve_app.models.config import load_hugging_face_config
from serve_app.models.loading.loader import load_model
from serve_app.models.parallel import Shard, shard_config


class ThreadGroup:
    """Sums over ranks that run as threads of this process."""

    def __init__(self, num_ranks):
        self._barrier = threading.Barrier(num_ranks, timeout=60)
        self._parts = [None] * num_ranks
        self.num_sums = 0

    def reduce_of(self, rank):
        def reduce(tensor):
            self._parts[rank] = tensor.clone()
            self._barrier.wait()
            torch.sum(torch.stack(self._parts), 0, out=tensor)
            self.num_sums += rank == 0
            self._barrier.wait()

        return reduce


def run_shards(path, paged_runner, ids, num_ranks=2, **options):
    """Logits of every rank for a prompt and three decode steps, and the shards."""
    group = ThreadGroup(num_ranks)
    loaded = [
        load_model(path, shard=Shard(rank, num_ranks), **options) for rank in range(num_ranks)
    ]
    for rank, model in enumerate(loaded):
        model.network.reduce_over_ranks(group.reduce_of(rank))

    def run(model):
        with torch.inference_mode():
            return logits_of(paged_runner(model.network), ids)

    with ThreadPoolExecutor(num_ranks) as pool:
        return list(pool.map(run, loaded)), loaded, group


def logits_of(runner, ids):
    logits = [runner.prefill("a", ids, chunk_size=11)]
    logits += [runner.step([("a", token)])["a"] for token in (5, 6, 7)]
    return torch.cat(logits)


@pytest.mark.parametrize(
    "family", ["llama", "llama-tied", "llama-bias", "qwen2", "qwen3", "mistral"]
)
def test_shards_compute_what_the_whole_network_does(saved, paged_runner, prompt, family):
    ids = prompt(30)
    whole = load_model(saved(family), dtype="float32")
    expected = logits_of(paged_runner(whole.network), ids)
    parts, loaded, group = run_shards(saved(family), paged_runner, ids, dtype="float32")
    for logits in parts:
        assert (logits - expected).abs().max() < 1e-4
        assert torch.equal(logits.argmax(-1), expected.argmax(-1))
    spec = loaded[0].network.kv_spec
    assert 2 * spec.bytes_per_token == whole.network.kv_spec.bytes_per_token
    assert loaded[0].weights_bytes < 0.8 * whole.weights_bytes
    assert group.num_sums == 2 * 2 * 6  # per layer and forward pass


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
def test_shards_of_a_packed_file(tmp_path, gguf_writer, paged_runner, prompt, kind):
    path = gguf_writer(tmp_path / "m.gguf", kind)
    ids = prompt(30)
    whole = load_model(path, dtype="float32", weight_format="dense")
    expected = logits_of(paged_runner(whole.network), ids)
    with pytest.raises(ConfigError, match="cut groups of 32"):
        load_model(path, shard=Shard(0, 2))  # 96 columns of down_proj are 48 each
    assert expected.isfinite().all()


def test_shards_of_packed_groups(tmp_path, paged_runner, prompt):
    import transformers

    from tests.unit.models.loading.checkpoints import gptq, rewrite, round_layer

    config = transformers.Qwen2Config(
        vocab_size=96,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=192,
        max_position_embeddings=128,
        initializer_range=0.15,
    )
    torch.manual_seed(0)
    with torch.inference_mode(False):
        transformers.Qwen2ForCausalLM(config).save_pretrained(tmp_path)

    def change(layer, weight):
        if "_proj" not in layer:
            return None
        rounded = round_layer(weight)
        return gptq(rounded), rounded.dense

    rewrite(tmp_path, {"quant_method": "gptq", "bits": 4, "group_size": 32}, change)
    ids = prompt(30)
    whole = load_model(tmp_path, dtype="float32")
    expected = logits_of(paged_runner(whole.network), ids)
    parts, _, _ = run_shards(tmp_path, paged_runner, ids, dtype="float32")
    assert (parts[0] - expected).abs().max() < 1e-4


@pytest.mark.parametrize(("num_ranks", "named"), [(3, "num_heads = 4"), (4, "num_kv_heads = 2")])
def test_what_does_not_divide_is_named(saved, num_ranks, named):
    with pytest.raises(ConfigError, match=named) as error:
        shard_config(load_hugging_face_config(saved("llama")), Shard(0, num_ranks))
    assert error.value.param == "engine.tensor_parallel_size"
    assert "\n" not in str(error.value)
