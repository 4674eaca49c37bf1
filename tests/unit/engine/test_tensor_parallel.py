"""One engine over two processes: the same ids as one, and a typed end when a rank dies."""

from __future__ import annotations

import os
import signal

import pytest
import torch
import torch.distributed as dist

from serve_app.config.model_source import resolve_model
from serve_app.config.schema import AppConfig, EngineSection, ModelSection
from serve_app.core.errors import ConfigError, EngineError
from serve_app.core.events import FinishReason
from serve_app.core.sampling import SamplingParams
from serve_app.engine.factory import create_engine
from serve_app.engine.native import NativeEngine
from serve_app.engine.tensor_parallel import (
    ParallelGraphs,
    ParallelNetwork,
    create_parallel_engine,
)
from serve_app.engine.tensor_parallel_group import RankLostError
from serve_app.engine.tensor_parallel_inputs import (
    describe,
    num_values,
    pack_inputs,
    unpack_inputs,
)
from serve_app.models.interface import AttentionMetadata, PrefillChunk

SETTINGS = {
    "device": "cpu",
    "dtype": "float32",
    "kv_cache_tokens": 384,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 96,
    "tensor_parallel_size": 2,
}


def test_two_ranks_give_the_ids_of_one_until_one_dies(
    tiny_folder, reference, run_all, random_prompts
):
    prompts = random_prompts(8, seed=5)
    params = SamplingParams(temperature=0.0, max_tokens=16)
    engine = create_engine(ModelSection(path=str(tiny_folder)), EngineSection(**SETTINGS))
    assert isinstance(engine, NativeEngine)
    network = engine._runner.network
    assert isinstance(network, ParallelNetwork)
    try:
        collected = run_all(engine, {f"r{i}": (p, params) for i, p in enumerate(prompts)})
        engine.check_integrity()
        assert engine.stats().num_chunked_prefills_total > 0
        for i, prompt in enumerate(prompts):
            assert collected.ids(f"r{i}") == reference.generate(prompt, 16)
        cache = engine._runner.kv_cache
        assert cache.shape[4] == reference.model.config.num_key_value_heads // 2

        (pid,) = network._ranks.pids
        engine.submit("last", prompts[0], params)
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        (event,) = engine.step()
        assert event.finish_reason is FinishReason.ERROR
        assert event.error is not None
        with pytest.raises(EngineError, match="rank 1 of the tensor-parallel engine was lost"):
            engine.step()
    finally:
        engine.close()
    assert not dist.is_initialized()


def test_a_rank_that_cannot_load_says_why(tiny_folder, tmp_path):
    section = EngineSection(**SETTINGS | {"tensor_parallel_size": 3})
    with pytest.raises(ConfigError, match="cut into 3 parts") as error:
        create_engine(ModelSection(path=str(tiny_folder)), section)
    assert error.value.param == "engine.tensor_parallel_size"
    assert not dist.is_initialized()


def test_inputs_come_out_as_they_went_in():
    metadata = AttentionMetadata(
        num_decodes=2,
        slot_mapping=torch.arange(100, 107),
        decode_block_tables=torch.tensor([[1, 2, 0], [3, 4, 5]]),
        decode_context_lens=torch.tensor([20, 40]),
        max_decode_context_len=48,
        prefill_chunks=(
            PrefillChunk(2, 3, 19, torch.tensor([6, 7])),
            PrefillChunk(5, 2, 2, torch.tensor([8])),
        ),
    )
    ids, positions = torch.arange(7), torch.arange(7) + 50
    description = describe(7, metadata)
    packed = pack_inputs(ids, positions, metadata)
    assert packed.shape == (num_values(description),)
    got_ids, got_positions, got = unpack_inputs(description, packed)
    assert torch.equal(got_ids, ids)
    assert torch.equal(got_positions, positions)
    for name in ("slot_mapping", "decode_block_tables", "decode_context_lens"):
        assert torch.equal(getattr(got, name), getattr(metadata, name))
    assert got.max_decode_context_len == 48
    for theirs, ours in zip(got.prefill_chunks, metadata.prefill_chunks, strict=True):
        assert (theirs.start, theirs.length, theirs.context_len) == (
            ours.start,
            ours.length,
            ours.context_len,
        )
        assert torch.equal(theirs.block_table, ours.block_table)


def test_prefills_alone_come_out_too():
    nothing = torch.empty(0, dtype=torch.int64)
    chunk = PrefillChunk(0, 2, 2, torch.tensor([3]))
    metadata = AttentionMetadata(0, torch.arange(2), nothing.view(0, 0), nothing, 1, (chunk,))
    description = describe(2, metadata)
    _, _, got = unpack_inputs(description, pack_inputs(torch.arange(2), torch.arange(2), metadata))
    assert got.num_decodes == 0
    assert torch.equal(got.prefill_chunks[0].block_table, chunk.block_table)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"kind": "transformers"}, "kind: native"),
        ({"batch_invariant": True}, "batch_invariant"),
    ],
)
def test_what_does_not_go_with_it(changes, named):
    with pytest.raises(ValueError, match=named):
        EngineSection(tensor_parallel_size=2, **changes)


def test_the_replica_holds_as_many_cards():
    engine = {"tensor_parallel_size": 2}
    with pytest.raises(ValueError, match="num_cards is 1"):
        AppConfig(engine=engine, model_replica={"pool": "arc"})
    AppConfig(engine=engine, model_replica={"pool": "arc", "num_cards": 2})
    AppConfig(engine=engine)


def test_the_error_of_a_lost_rank_names_it():
    assert "rank 3" in RankLostError(3).message


def test_xpu_cannot_capture_sums_over_cards(tiny_folder):
    section = EngineSection(tensor_parallel_size=2, capture_graphs=True)
    model = ModelSection(path=str(tiny_folder))
    with pytest.raises(ConfigError, match="capture_graphs") as error:
        create_parallel_engine(
            resolve_model(model), model, section, torch.device("xpu", 0), lambda stage: None
        )
    assert error.value.param == "engine.capture_graphs"


class CountingNetwork:
    """Stands for a network whose forward passes are recorded by whoever captures."""

    num_recorded = 0


class OneCallGraphs:
    """Calls the function once for the recording, and its replay gives the same."""

    is_capturing = True

    def capture(self, function):
        result = function()
        return lambda: result


class SentFrames(list):
    """Keeps what would be sent to the other ranks."""

    def send(self, *parts):
        self.append(parts)


def test_replays_of_forward_passes_alone_are_told_to_the_other_ranks():
    network, sent = CountingNetwork(), SentFrames()
    graphs = ParallelGraphs(OneCallGraphs(), network, sent)

    def forward():
        network.num_recorded += 1
        return torch.zeros(1)

    first, sampler, second = (
        graphs.capture(function) for function in (forward, lambda: torch.ones(1), forward)
    )
    assert sent == []
    for replay in (second, sampler, first):
        replay()
    assert sent == [("replay", 1), ("replay", 0)]
