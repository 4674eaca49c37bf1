import random

import pytest
import torch

from serve_app.bench.decode import SHAPES
from serve_app.config.schema import EngineSection
from serve_app.core.sampling import SamplingParams
from serve_app.engine import devices
from serve_app.engine.native import NativeEngine
from serve_app.engine.transfers import Uploads
from serve_app.models.loading.random_source import make_random_model

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA card")
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaMemcpy")


class FakeXpu:
    """torch.xpu as far as memory goes: `empty_cache` frees what no kernel in flight still uses."""

    def __init__(self):
        self.cached, self.in_use = 100, 40

    def synchronize(self):
        self.in_use = 0

    def empty_cache(self):
        self.cached = self.in_use


def test_on_a_cpu_nothing_moves():
    tensor = torch.arange(3)
    assert Uploads(torch.device("cpu")).send(tensor) is tensor


def test_unused_memory_of_an_xpu_is_given_back_whole(monkeypatch):
    xpu = FakeXpu()
    monkeypatch.setattr(devices.torch, "get_device_module", lambda device: xpu)
    devices.release_cached_memory(torch.device("xpu", 0))
    assert xpu.cached == 0


@needs_cuda
def test_decode_steps_copy_beside_kernels_and_never_wait_for_the_stream():
    model = make_random_model(SHAPES["smollm2-135m"], device=torch.device("cuda", 0))
    engine = NativeEngine(model, EngineSection(kv_cache_tokens=4096, max_num_seqs=8))
    rng = random.Random(0)
    params = SamplingParams(temperature=0.0, max_tokens=160, ignore_eos=True)
    for i in range(8):
        engine.submit(str(i), [rng.randrange(1000) for _ in range(16)], params)
    for _ in range(20):
        engine.step()
    before = engine.stats().num_steps_total
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        for _ in range(100):
            engine.step()
    assert engine.stats().num_steps_total - before == 100
    names = [event.name for event in profile.events()]
    # the profiler waits for the device once, when it stops
    assert sum(name in WAITS for name in names) <= 1, {n for n in names if n in WAITS}
    # what asynchronous scheduling waits for: a step's ids
    assert names.count("cudaEventSynchronize") <= 101
    on_device = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    copies = [e.time_range for e in on_device if "HtoD" in e.name]
    kernels = [e.time_range for e in on_device if "Mem" not in e.name]
    assert len(copies) >= 100
    beside = sum(any(k.start < c.end and c.start < k.end for k in kernels) for c in copies)
    assert beside > 0, "no host-to-device copy ran beside a kernel"
    assert engine.stats().num_cache_releases_total == 0
    engine.close()
