"""`engine.kind: auto`: which engine runs this model here, and why.

The native engine has every capability that the API promises, so it is the answer wherever it knows
the architecture. Where `engine.auto_may_lack_features` is set and OpenVINO is installed, both are
measured once: OpenVINO is offered only if it repeats the native engine's float32 answers, and taken
if it is faster. The answer is kept per machine, model and versions.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from serve_app import __version__
from serve_app.config.cache_folder import cache_folder
from serve_app.config.model_source import ModelFormat, ModelSource
from serve_app.config.schema import EngineSection, ModelSection
from serve_app.core.errors import XeRayError
from serve_app.engine.openvino_runtime import is_openvino_installed
from serve_app.hardware.cpu import read_cpu_info

_LOG = logging.getLogger(__name__)
MIN_AGREEMENT = 0.98
"""Share of places at which the most likely token must be the reference's."""
MAX_PERPLEXITY_CHANGE = 0.01
_HEAD_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Measurement:
    """Figures of one candidate beside the native engine.

    agreement: share of equal most likely tokens, teacher-forced; perplexity_ratio: over that of
    the float32 reference; speedup: geometric mean over the batch sizes of decode tokens/s ratios.
    """

    agreement: float
    perplexity_ratio: float
    speedup: float

    def refusal(self) -> str | None:
        """Return why the candidate cannot stand in for the reference, None where it can."""
        if self.agreement < MIN_AGREEMENT:
            return f"only {self.agreement:.1%} of its tokens are the float32 reference's"
        if abs(self.perplexity_ratio - 1) > MAX_PERPLEXITY_CHANGE:
            return f"its perplexity is {self.perplexity_ratio:.3f} × the float32 reference's"
        return None


@dataclass(frozen=True, slots=True)
class Choice:
    """The engine that `auto` takes, the reason in words, and the figures if it was measured."""

    kind: str
    reason: str
    measurement: Measurement | None = None


Measure = Callable[[ModelSource, ModelSection, EngineSection], Measurement]


def choose_engine(
    source: ModelSource,
    model: ModelSection,
    section: EngineSection,
    *,
    measure: Measure | None = None,
    on_measuring: Callable[[], None] = lambda: None,
) -> Choice:
    """Return native or openvino for a model that the native engine knows; logs which and why.

    `measure` replaces the measurement, `on_measuring` is told before it starts.
    """
    obstacle = _obstacle(source, section)
    if obstacle is not None:
        choice = Choice("native", obstacle)
    else:
        path = _cache_path(source, model, section)
        kept = _read(path)
        if kept is None:
            on_measuring()
            kept = _measured(source, model, section, measure)
            _write(path, kept)
        choice = kept
    _LOG.info("engine.kind auto: %s, because %s", choice.kind, choice.reason)
    return choice


def _obstacle(source: ModelSource, section: EngineSection) -> str | None:
    """Return why there is nothing to measure, None where there is."""
    if section.device not in ("auto", "cpu"):
        return "it is the engine of this device"
    if not section.auto_may_lack_features:
        return (
            "it alone has all that the API promises (openvino lacks logit_bias, top_logprobs,"
            " seed and cache_salt; engine.auto_may_lack_features lets it compete)"
        )
    if section.batch_invariant:
        return "openvino cannot promise batch_invariant"
    if not is_openvino_installed():
        return "openvino-genai is not installed"
    if source.format is not ModelFormat.GGUF and not (source.path / "openvino_model.xml").is_file():
        return "openvino reads .gguf files and its own IR, and this is neither"
    return None


def _measured(
    source: ModelSource, model: ModelSection, section: EngineSection, measure: Measure | None
) -> Choice:
    if measure is None:
        from serve_app.engine.auto_measure import measure_openvino

        measure = measure_openvino
    try:
        figures = measure(source, model, section)
    except XeRayError as error:
        return Choice("native", f"openvino could not be measured: {error.message}")
    if (refusal := figures.refusal()) is not None:
        return Choice("native", f"openvino answers differently: {refusal}", figures)
    if figures.speedup <= 1.0:
        return Choice("native", f"openvino decodes at {figures.speedup:.2f} × its speed", figures)
    return Choice("openvino", f"it decodes at {figures.speedup:.2f} × native's speed", figures)


def _cache_path(source: ModelSource, model: ModelSection, section: EngineSection) -> Path:
    cpu = read_cpu_info()
    machine = [cpu.model_name, cpu.microcode, sorted(cpu.flags), sorted(os.sched_getaffinity(0))]
    names = ("torch", "openvino-genai")
    versions = [__version__, *(importlib.metadata.version(name) for name in names)]
    settings = section.model_dump(mode="json", include={"dtype", "weight_format", "num_threads"})
    facts = [machine, versions, settings, model.max_model_len, _model_facts(source)]
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    return cache_folder("engine") / f"{source.name.replace(os.sep, '-')}-{digest}.json"


def _model_facts(source: ModelSource) -> list[Any]:
    path = source.path
    if path.is_dir():
        path = path / "openvino_model.xml"
    stat = path.stat()
    with path.open("rb") as handle:
        head = hashlib.sha256(handle.read(_HEAD_BYTES)).hexdigest()
    return [str(source.path), stat.st_size, stat.st_mtime_ns, head]


def _read(path: Path) -> Choice | None:
    """Return the choice that was kept, None where there is none or it makes no sense."""
    try:
        values = json.loads(path.read_text())
        figures = values["measurement"]
        numbers = {field.name: float(figures[field.name]) for field in fields(Measurement)}
        kind, reason = values["kind"], values["reason"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        _LOG.warning("%s cannot be used (%r): measuring again", path, error)
        return None
    if kind not in ("native", "openvino") or not isinstance(reason, str):
        _LOG.warning("%s names no engine: measuring again", path)
        return None
    return Choice(kind, reason, Measurement(**numbers))


def _write(path: Path, choice: Choice) -> None:
    """Keep a measured choice; a failure to measure is tried again at the next start."""
    if choice.measurement is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as handle:
            json.dump(asdict(choice), handle)
        os.replace(handle.name, path)
    except OSError as error:
        _LOG.warning("cannot keep the choice of the engine in %s: %s", path, error)
