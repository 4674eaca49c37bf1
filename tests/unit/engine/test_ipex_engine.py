"""The ipex engine on a stand-in for the extension, built from its documented behaviour.

`ipex.llm.optimize` returns the network with some layers replaced by classes of its own package and
refuses what it does not know; `ipex.optimize` keeps the layers. `make test-ipex` runs the real one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from serve_app.config.schema import EngineSection, ModelSection
from serve_app.core.errors import (
    ConfigError,
    ContextLengthError,
    EngineError,
    UnsupportedParameterError,
)
from serve_app.core.events import BatchingMode, BatchingOptions, FinishReason
from serve_app.core.sampling import SamplingParams
from serve_app.engine.factory import create_engine
from serve_app.engine.ipex_engine import IpexEngine
from serve_app.engine.static_batch import warp_row

GREEDY = SamplingParams(temperature=0.0, max_tokens=12)
LONG = SamplingParams(temperature=0.0, max_tokens=300)
Make = Callable[..., IpexEngine]


class FusedMLP(torch.nn.Module):
    """A layer as the extension would put it in the place of the network's own."""

    __module__ = "intel_extension_for_pytorch.transformers.models"

    def __init__(self, original: torch.nn.Module) -> None:
        super().__init__()
        self.original = original

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.original(x)


@pytest.fixture
def extension(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType("intel_extension_for_pytorch")
    module.__version__ = torch.__version__.partition("+")[0]
    module.calls = []

    def optimize_llm(network: Any, *, dtype: torch.dtype, inplace: bool) -> Any:
        module.calls.append("llm")
        if network.config.architectures is None:
            raise TypeError("'NoneType' object is not subscriptable")
        for layer in network.model.layers:
            layer.mlp = FusedMLP(layer.mlp)
        return network

    def optimize(network: Any, *, dtype: torch.dtype, inplace: bool, weights_prepack: bool) -> Any:
        module.calls.append(f"plain, prepack={weights_prepack}")
        return network

    module.llm = SimpleNamespace(optimize=optimize_llm)
    module.optimize = optimize
    monkeypatch.setitem(sys.modules, "intel_extension_for_pytorch", module)
    return module


@pytest.fixture
def make_ipex(tiny_folder: Path, extension: ModuleType) -> Iterator[Make]:
    engines: list[IpexEngine] = []

    def make(**section: object) -> IpexEngine:
        settings = {
            "kind": "ipex", "kv_cache_tokens": 2048, "dtype": "float32", "warmup": False, **section
        }  # fmt: skip
        engine = create_engine(ModelSection(path=str(tiny_folder)), EngineSection(**settings))
        assert isinstance(engine, IpexEngine)
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.close()


def test_a_batch_streams_the_reference_s_tokens_each_to_its_own_end(make_ipex, run_all, reference):
    engine = make_ipex(warmup=True)
    prompts = [[5, 6, 7], [9, 4, 1, 2, 8], list(range(20, 60)), [11]]
    lengths = [12, 3, 7, 1]
    requests = {
        f"r{i}": (prompt, SamplingParams(temperature=0.0, max_tokens=length))
        for i, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
    }
    collected = run_all(engine, requests)
    for i, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        assert collected.ids(f"r{i}") == reference.generate(prompt, length)
        assert collected.end(f"r{i}").finish_reason is FinishReason.LENGTH
        assert len(collected.events[f"r{i}"]) == length, "tokens come one after the other"
    stats = engine.stats()
    assert stats.num_steps_total == 12, "one batch, as long as its longest sequence"
    assert stats.num_generation_tokens_total == sum(lengths)
    assert (stats.max_num_running, stats.num_joins_total, stats.mode) == (4, 0, "static")
    assert stats.num_free_blocks == stats.num_blocks


def test_it_says_what_it_is(make_ipex, extension):
    info = make_ipex().info
    assert (info.engine, info.device, info.dtype) == ("ipex", "cpu", "float32")
    assert info.details["optimizer"] == "ipex.llm.optimize"
    assert "LlamaForCausalLM" in info.details["module_type"]
    assert info.details["module_type"].endswith("intel_extension_for_pytorch.transformers.models."
                                                "FusedMLP")  # fmt: skip
    assert info.capabilities.batching_modes == ("static", "off")
    assert info.max_num_seqs == 2048 // 512, "every sequence has room for its whole length"
    assert extension.calls == ["llm"]


def test_what_llm_optimize_refuses_goes_to_optimize_and_is_said(
    make_ipex, extension, monkeypatch, caplog
):
    def refuse(network: Any, **_: Any) -> Any:
        raise TypeError("'NoneType' object is not subscriptable")

    monkeypatch.setattr(extension.llm, "optimize", refuse)
    assert make_ipex().info.details["optimizer"] == "ipex.optimize"
    assert extension.calls == ["plain, prepack=True"]
    assert "ipex.llm.optimize refused the network" in caplog.text
    monkeypatch.setattr(extension, "optimize", refuse)
    with pytest.raises(ConfigError, match=r"neither .* takes this network"):
        make_ipex()


def test_stop_ids_end_one_row_and_the_others_go_on(make_ipex, run_all):
    engine = make_ipex()
    ids = run_all(engine, {"a": ([5, 6, 7], GREEDY)}).ids("a")
    cut = ids.index(ids[4]) + 1
    params = SamplingParams(temperature=0.0, max_tokens=12, stop_token_ids=(ids[4],))
    collected = run_all(engine, {"b": ([5, 6, 7], params), "c": ([5, 6, 7], GREEDY)})
    assert collected.ids("b") == ids[:cut]
    assert collected.end("b").finish_reason is FinishReason.STOP
    assert collected.end("b").stop_token_id == ids[4]
    assert collected.ids("c") == ids


def test_abort_ends_a_row_once_and_the_batch_when_it_was_the_last(make_ipex, run_all):
    engine = make_ipex()
    engine.submit("a", [5, 6, 7], LONG)
    engine.submit("b", [8, 9], GREEDY)
    engine.submit("never", [8], GREEDY)
    engine.abort("never")
    events = []
    while sum(event.request_id == "a" for event in events) < 3:
        events += engine.step()
    engine.abort("a")
    engine.abort("a")
    while engine.has_work():
        events += engine.step()
    ends = {event.request_id: event.finish_reason for event in events if event.finish_reason}
    assert ends == {
        "a": FinishReason.ABORTED, "b": FinishReason.LENGTH, "never": FinishReason.ABORTED
    }  # fmt: skip
    assert sum(event.finish_reason is not None for event in events) == 3
    assert sum(event.request_id == "a" for event in events) == 4, "three tokens and the end"
    assert engine.stats().num_steps_total <= 13, "nothing is computed for nobody"
    assert engine.stats().num_aborted_total == 2
    assert len(run_all(engine, {"c": ([5, 6, 7], GREEDY)}).ids("c")) == 12


def test_waiting_requests_start_when_the_batch_has_ended(make_ipex):
    engine = make_ipex(max_num_seqs=2)
    for i in range(3):
        engine.submit(f"r{i}", [5 + i], GREEDY)
    events = []
    while engine.has_work():
        events += engine.step()
    order = [event.request_id for event in events]
    waits = [event.queue_time_s for event in events if event.queue_time_s is not None]
    assert len(waits) == 3, "each first event tells how long its request has waited, no other"
    assert 0 <= max(waits[:2]) < waits[2]
    assert order.index("r2") > max(place for place, name in enumerate(order) if name != "r2")
    assert engine.stats().max_num_running == 2


def test_toggles_off_pause_and_no_joining(make_ipex, run_all):
    engine = make_ipex()
    engine.configure(BatchingOptions(BatchingMode.OFF))
    run_all(engine, {f"r{i}": ([5 + i], GREEDY) for i in range(3)})
    assert engine.stats().max_num_running == 1
    with pytest.raises(ConfigError, match=r"batching\.mode.*static or off"):
        engine.configure(BatchingOptions(BatchingMode.CONTINUOUS))
    engine.submit("a", [5], GREEDY)
    first = engine.step()
    engine.pause()
    assert not engine.has_work()
    assert engine.step() == []
    engine.resume()
    while engine.has_work():
        first += engine.step()
    assert len(first) == 12


def test_what_generate_lacks_is_refused(make_ipex):
    engine = make_ipex()
    for params in (
        SamplingParams(logprobs=0),
        SamplingParams(seed=1),
        SamplingParams(repetition_penalty=1.2),
        SamplingParams(cache_salt="a"),
    ):
        with pytest.raises(UnsupportedParameterError, match="the ipex engine does not support it"):
            engine.submit("a", [1], params)
    with pytest.raises(ContextLengthError):
        engine.submit("a", [1] * 512, GREEDY)


def test_a_failing_network_ends_every_request_and_then_the_engine(make_ipex, monkeypatch):
    engine = make_ipex(max_num_seqs=1)

    def fail(**_: Any) -> None:
        raise RuntimeError("could not create a primitive")

    monkeypatch.setattr(engine._network, "generate", fail)
    for i in range(5):
        engine.submit(f"r{i}", [5], GREEDY)
    events = []
    while engine._dead is None:
        events += engine.step()
    assert engine.has_work(), "the worker must come to know that the engine is dead"
    events += engine._events
    with pytest.raises(EngineError, match="no longer works"):
        engine.step()
    assert [event.finish_reason for event in events] == [FinishReason.ERROR] * 5
    assert {event.request_id for event in events} == {f"r{i}" for i in range(5)}


def test_closing_ends_a_running_batch(make_ipex):
    engine = make_ipex()
    engine.submit("a", [5, 6, 7], LONG)
    engine.step()
    engine.pause()
    engine.close()
    assert not engine.stats().num_running


def test_absent_wrong_and_impossible_are_one_line(tiny_folder, extension, monkeypatch):
    def create(**section: object) -> None:
        create_engine(ModelSection(path=str(tiny_folder)), EngineSection(kind="ipex", **section))

    with pytest.raises(ConfigError, match="cannot promise it"):
        create(batch_invariant=True)
    with pytest.raises(ConfigError, match="runs on CPU"):
        create(device="xpu")
    with pytest.raises(ConfigError, match="Hugging Face folder"):
        create_engine(ModelSection(), EngineSection(kind="ipex"))
    extension.__version__ = "2.8.0+cpu"
    monkeypatch.setattr(torch, "__version__", "2.13.0+cpu")
    with pytest.raises(ConfigError, match=r"only with torch 2\.8, but torch 2\.13.*xeray\[ipex\]"):
        create()
    monkeypatch.delitem(sys.modules, "intel_extension_for_pytorch")
    monkeypatch.setattr("importlib.metadata.version", _no_package)
    with pytest.raises(ConfigError, match=r"pip install 'xeray\[ipex\]'") as caught:
        create()
    assert "\n" not in caught.value.message


def _no_package(name: str) -> str:
    from importlib.metadata import PackageNotFoundError

    raise PackageNotFoundError(name)


def test_each_row_is_sampled_its_own_way():
    logits = torch.tensor([1.0, 3.0, 2.0, -1.0])
    greedy = warp_row(logits, SamplingParams(temperature=0.0)).softmax(-1)
    assert greedy.tolist() == [0, 1, 0, 0]
    hot = warp_row(logits, SamplingParams(temperature=2.0))
    assert hot.tolist() == [0.5, 1.5, 1.0, -0.5]
    two = warp_row(logits, SamplingParams(top_k=2)).softmax(-1)
    assert (two > 0).tolist() == [False, True, True, False]
    # Shares are .09 .66 .24 .01: the second one brings the mass to 0.9 of the first three.
    most = warp_row(logits, SamplingParams(top_p=0.7)).softmax(-1)
    assert (most > 0).tolist() == [False, True, True, False]
    least = warp_row(logits, SamplingParams(top_p=0.01)).softmax(-1)
    assert least.tolist() == [0, 1, 0, 0]
