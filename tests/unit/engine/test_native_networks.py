"""The engine over the real networks of `serve_app.models`, on every device that is here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from serve_app.config.schema import EngineSection, ModelSection
from serve_app.core.sampling import SamplingParams
from serve_app.engine.factory import create_engine
from serve_app.engine.native import NativeEngine

DEVICES = [
    "cpu",
    *(name for name in ("cuda", "xpu") if torch.get_device_module(name).is_available()),
]


def make(folder: Path, device: str, **section: object) -> NativeEngine:
    settings = {
        "device": device,
        "dtype": "float32",
        "kv_cache_tokens": 384,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 96,
        **section,
    }
    engine = create_engine(ModelSection(path=str(folder)), EngineSection(**settings))
    assert isinstance(engine, NativeEngine)
    return engine


@pytest.mark.parametrize("device", DEVICES)
def test_greedy_output_is_the_references(tiny_folder, reference, run_all, random_prompts, device):
    prompts = random_prompts(18, seed=11)
    params = SamplingParams(temperature=0.0, max_tokens=24)
    engine = make(tiny_folder, device)
    collected = run_all(engine, {f"r{i}": (p, params) for i, p in enumerate(prompts)})
    engine.check_integrity()
    stats = engine.stats()
    assert stats.num_preemptions_total > 0
    assert stats.num_chunked_prefills_total > 0
    assert stats.num_used_blocks == 0
    for i, prompt in enumerate(prompts):
        assert collected.ids(f"r{i}") == reference.generate(prompt, 24)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_batch_invariance_alone_and_together(tiny_folder, run_all, random_prompts, device, dtype):
    prefix = list(range(100, 170))
    prompts = random_prompts(10, seed=12) + [[*prefix, 3 + i] for i in range(8)]
    requests = {
        f"r{i}": (
            prompt,
            SamplingParams(
                max_tokens=14,
                temperature=0.0 if i % 2 else 1.0,
                top_p=0.9 if i % 3 else 1.0,
                seed=i,
                repetition_penalty=1.1 if i % 5 == 0 else 1.0,
            ),
        )
        for i, prompt in enumerate(prompts)
    }
    together = make(tiny_folder, device, dtype=dtype, batch_invariant=True, kv_cache_tokens=320)
    crowd = run_all(together, requests)
    assert together.stats().num_preemptions_total > 0
    assert together.stats().num_prefix_hit_tokens_total > 0
    alone = make(tiny_folder, device, dtype=dtype, batch_invariant=True, kv_cache_tokens=320)
    for name, request in requests.items():
        assert run_all(alone, {name: request}).ids(name) == crowd.ids(name), name


@pytest.mark.parametrize("device", DEVICES)
def test_bfloat16_logprobs_are_near_the_references(tiny_folder, reference, run_all, device):
    prompt = list(range(20, 90))
    params = SamplingParams(max_tokens=8, temperature=0.0, logprobs=2, prompt_logprobs=0)
    collected = run_all(make(tiny_folder, device, dtype="bfloat16"), {"a": (prompt, params)})
    first = collected.events["a"][0]
    expected = reference.logprobs(prompt)
    told = torch.tensor([entry.logprob for entry in first.prompt_logprobs[1:]])
    wanted = expected[torch.arange(69), torch.tensor(prompt[1:])]
    assert (told - wanted).abs().median() < 0.2
    assert len(collected.ids("a")) == 8
