"""A tiny Llama with its own vocabulary, saved as a folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from serve_app.quantize.texts import CALIBRATION_TEXT, bundled_text
from serve_app.quantize.train_small import train_tokenizer


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of 64, tied, bfloat16, weights wide enough that outputs differ by token."""
    return _save_tiny(tmp_path_factory.mktemp("models") / "tiny", is_tied=True)


@pytest.fixture(scope="session")
def untied_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with an output layer of its own, in float32, and with qwen2's biases."""
    return _save_tiny(tmp_path_factory.mktemp("models") / "untied", is_tied=False)


def _save_tiny(folder: Path, *, is_tied: bool) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    folder.mkdir()
    train_tokenizer(bundled_text(CALIBRATION_TEXT)[:20000], folder)
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 2048,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.1,
        "bos_token_id": None,
        "eos_token_id": 0,
        "tie_word_embeddings": is_tied,
    }
    if is_tied:
        model = LlamaForCausalLM(LlamaConfig(**sizes)).to(torch.bfloat16)
    else:
        model = Qwen2ForCausalLM(Qwen2Config(**sizes))
    model.save_pretrained(folder)
    return folder
