"""The ipex engine on the real extension, over HTTP: `make test-ipex`."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

pytestmark = [pytest.mark.ipex, pytest.mark.timeout(420)]

_MAKE_MODEL = """
import sys
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

folder = sys.argv[1]
alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
tokenizer = Tokenizer(models.BPE({text: i for i, text in enumerate(alphabet)}, []))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
torch.manual_seed(3)
config = LlamaConfig(
    vocab_size=256, hidden_size=256, intermediate_size=768, num_hidden_layers=4,
    num_attention_heads=8, num_key_value_heads=2, max_position_embeddings=2048,
    initializer_range=0.1,
)
LlamaForCausalLM(config).save_pretrained(folder)
tokenizer.save(folder + "/tokenizer.json")
"""

_DESCRIBE = """
import json, sys
from serve_app.config.schema import EngineSection, ModelSection
from serve_app.engine.factory import create_engine

section = EngineSection(kind="ipex", dtype="float32", kv_cache_tokens=4096, num_threads=1)
engine = create_engine(ModelSection(path=sys.argv[1], max_model_len=512), section)
print("FACTS " + json.dumps(engine.info.details))
engine.close()
"""

_CONFIG = """
proxy_location: HeadOnly
http_options: {{host: 127.0.0.1, port: {port}, request_timeout_s: null}}
applications:
  - name: xeray
    route_prefix: /
    import_path: serve_app:build_app
    args:
      model: {{path: {folder}, aliases: ["*"]}}
      engine: {{kind: ipex, dtype: float32, kv_cache_tokens: 16384, max_num_seqs: 8}}
      ingress: {{num_replicas: 1}}
      preprocessor: {{num_replicas: 1, xeon_cores: 1, reserve_xeon_cores: false}}
      model_replica: {{pool: cpu, num_cpus: 0.5, batching: {{mode: static}}}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    subprocess.run([sys.executable, "-c", _MAKE_MODEL, str(folder)], check=True, timeout=180)
    return folder


@pytest.fixture(scope="module")
def url(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = tmp_path_factory.mktemp("service")
    config, log = place / "serve.yaml", place / "serve.log"
    config.write_text(_CONFIG.format(port=port, folder=folder))
    command = [sys.executable, "-m", "serve_app.cli.main", "serve", str(config)]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=os.environ)
    try:
        base = f"http://127.0.0.1:{port}"
        _wait_until_ready(base, process, log)
        yield base
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(90)


def _wait_until_ready(base: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline_s = time.monotonic() + 240
    while time.monotonic() < deadline_s:
        assert process.poll() is None, log.read_text(errors="replace")
        try:
            if httpx.get(f"{base}/readyz", timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.5)
    raise AssertionError(f"not ready:\n{log.read_text(errors='replace')}")


def _metric(base: str, name: str) -> float:
    text = httpx.get(f"{base}/metrics", timeout=10).text
    values = [float(value) for value in re.findall(rf"^{name}{{[^}}]*}} (\S+)$", text, re.M)]
    return max(values, default=0.0)


def _wait_for(base: str, name: str, least: float) -> None:
    deadline_s = time.monotonic() + 20
    while _metric(base, name) < least:
        assert time.monotonic() < deadline_s, f"{name} stays below {least}"
        time.sleep(0.5)


def test_the_extension_has_replaced_layers(folder: Path) -> None:
    command = [sys.executable, "-c", _DESCRIBE, str(folder)]
    done = subprocess.run(command, check=True, timeout=180, capture_output=True, text=True)
    (line,) = [each for each in done.stdout.splitlines() if each.startswith("FACTS ")]
    facts = json.loads(line.removeprefix("FACTS "))
    print(f"\noptimised by {facts['optimizer']}: {facts['module_type']}")
    assert facts["optimizer"] == "ipex.llm.optimize"
    assert "intel_extension_for_pytorch" in facts["module_type"]


def test_one_is_streamed_and_is_the_whole_answer(url: str) -> None:
    body = {"model": "any", "prompt": "Go", "temperature": 0, "max_tokens": 24}
    whole = httpx.post(f"{url}/v1/completions", json=body, timeout=120).json()
    assert whole["usage"]["completion_tokens"] == 24
    streamed = {**body, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=streamed, timeout=120) as response:
        events = [line[6:] for line in response.iter_lines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    chunks = [json.loads(event)["choices"] for event in events[:-1]]
    assert len([choices for choices in chunks if choices]) > 1
    text = "".join(choices[0]["text"] for choices in chunks if choices)
    assert text == whole["choices"][0]["text"]
    print(f"\nstreamed: 24 tokens in {len(events) - 1} events")


def test_one_is_cancelled(url: str) -> None:
    before = _metric(url, "xeray_num_aborted_total")
    body = {
        "model": "any", "prompt": "Go", "max_tokens": 1800, "ignore_eos": True, "stream": True
    }  # fmt: skip
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=120) as response:
        pieces = response.iter_text()
        next(pieces)
    _wait_for(url, "xeray_num_aborted_total", before + 1)
    print("\ncancelled: the row ended when its client left")


async def test_some_are_batched(url: str) -> None:
    async with httpx.AsyncClient(timeout=120) as client:
        answers = await asyncio.gather(
            *(
                client.post(
                    f"{url}/v1/completions",
                    json={"model": "any", "prompt": "Go" * i, "temperature": 0, "max_tokens": 20},
                )
                for i in range(1, 7)
            )
        )
    assert [answer.json()["usage"]["completion_tokens"] for answer in answers] == [20] * 6
    _wait_for(url, "xeray_max_num_requests_running", 2)
    print(f"\nbatched: {_metric(url, 'xeray_max_num_requests_running'):.0f} sequences at once")
