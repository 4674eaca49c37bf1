"""A small dense model, and a check that a quantized folder means it."""

from __future__ import annotations

import pytest
import torch

from serve_app.models.loading.loader import load_model
from serve_app.models.loading.quantization.table import open_folder
from serve_app.models.quantized import QuantizedWeight
from tests.unit.models.loading.quantization.formats import DOWN

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 192,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.fixture(scope="package")
def model():
    import transformers

    torch.manual_seed(0)
    with torch.inference_mode(False):
        return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SHAPE)).eval()


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path)
    return tmp_path


def expected_logits(model, dense, ids):
    missing, unexpected = model.load_state_dict(dense, strict=True)
    assert not missing
    assert not unexpected
    return model(torch.tensor([ids])).logits[0]


@pytest.fixture
def check(model, folder, paged_runner, prompt, device):
    """A function (dense): the file means it, exactly, and both networks compute it."""

    def run(dense, *, packed="int4", similarity=0.999):
        target = torch.device(device)
        source = open_folder(folder, target, torch.float32, dense)
        assert source.names() == dense.keys()
        for name, weight in dense.items():
            read = source.read(name)
            if isinstance(read, QuantizedWeight):
                read = read.dequantize(torch.float32)
            torch.testing.assert_close(read.float().cpu(), weight, rtol=2e-7, atol=1e-7)
        assert isinstance(source.read(DOWN), QuantizedWeight) == (packed != "dense")
        ids = prompt(40)
        expected = expected_logits(model, dense, ids)
        loaded = load_model(folder, device=target, dtype="float32")
        logits = paged_runner(loaded.network).prefill("a", ids)
        assert (logits - expected).abs().max() < (1e-4 if device == "cpu" else 1e-3)
        loaded = load_model(folder, device=target, dtype="bfloat16")
        assert loaded.weight_format == packed or device != "cpu"
        logits = paged_runner(loaded.network).prefill("a", ids)
        found = torch.nn.functional.cosine_similarity(logits, expected, dim=-1)
        assert found.mean() > similarity
        assert found.min() > 1 - 10 * (1 - similarity)

    return run


@pytest.fixture(autouse=True)
def _restored(model):
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    yield
    model.load_state_dict(weights)
