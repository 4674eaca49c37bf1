"""An architecture that the native engine lacks, over HTTP."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

_MAKE_MODEL = """
import sys
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

folder = sys.argv[1]
alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
tokenizer = Tokenizer(models.BPE({text: i for i, text in enumerate(alphabet)}, []))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
torch.manual_seed(3)
config = GPTNeoXConfig(
    vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=2, max_position_embeddings=4096, initializer_range=0.3,
)
GPTNeoXForCausalLM(config).save_pretrained(folder)
tokenizer.save(folder + "/tokenizer.json")
"""
"""Run in a process of its own: this one stays free of torch, as the replicas' parents are."""


@pytest.fixture(scope="module")
def neox_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("neox")
    subprocess.run([sys.executable, "-c", _MAKE_MODEL, str(folder)], check=True, timeout=120)
    return folder


def test_gpt_neox_streams_and_is_cancelled_over_http(
    deployed: Callable[..., Any], neox_folder: Path
) -> None:
    app = deployed(
        {
            "model": {"path": str(neox_folder), "aliases": ["*"]},
            "engine": {
                "fixed_rate_tokens_per_s": None,
                "kv_cache_tokens": 8192,
                "dtype": "float32",
                "watchdog_min_s": 20.0,  # not what is tested, and other tests run beside
            },
        }
    )
    assert app.one("ModelReplica", "info").engine == "transformers"
    url = f"{app.url}/v1/completions"
    body = {"model": "any", "prompt": "Go", "temperature": 0, "max_tokens": 24}

    whole = httpx.post(url, json=body, timeout=60).json()
    with httpx.stream("POST", url, json={**body, "stream": True}, timeout=60) as response:
        events = [line[6:] for line in response.iter_lines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    chunks = [json.loads(event) for event in events[:-1]]
    assert not [chunk for chunk in chunks if "error" in chunk]
    text = "".join(chunk["choices"][0]["text"] for chunk in chunks if chunk["choices"])
    assert text == whole["choices"][0]["text"]
    assert whole["usage"]["completion_tokens"] == 24

    long = {**body, "max_tokens": 3000, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", url, json=long, timeout=60) as response:
        pieces = response.iter_text()  # kept: a collected iterator closes the response
        next(pieces)
        app.wait_states("ModelReplica", lambda s: s and s[0]["num_streams"] == 1)
    app.wait_states("ModelReplica", lambda s: s and s[0]["num_streams"] == 0, timeout_s=10)
    app.wait_states(
        "ModelReplica",
        lambda s: s and (s[0].num_running, s[0].num_used_blocks) == (0, 0),
        method="stats",
    )
