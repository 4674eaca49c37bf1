"""A folder with OpenVINO's IR for each kind of model: made once from a .gguf file, kept in a cache.

OpenVINO GenAI's reader of .gguf rounds the zero points of asymmetric 4-bit weights (Q4_1, Q4_K) to
whole numbers, which costs the embedded model 23 % of perplexity. The zero of a group is a fraction,
-offset / scale, so the IR gets it as float16 before it is kept.
"""

from __future__ import annotations

import hashlib
import importlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from serve_app.config.cache_folder import cache_folder
from serve_app.config.model_source import ModelFormat, ModelSource
from serve_app.core.errors import ConfigError
from serve_app.engine.openvino_runtime import import_openvino, openvino_version
from serve_app.models.config import NetworkConfig, load_hugging_face_config
from serve_app.models.gguf import GGUFFile
from serve_app.models.gguf_config import config_from_gguf
from serve_app.models.loading.gguf_source import GGUFSource, half_split_rows
from serve_app.models.packed import PackedRows
from serve_app.models.quantized import QuantizedWeight

_LOG = logging.getLogger(__name__)
IR_NAME = "openvino_model.xml"
_CONVERSION = 1
"""Raised when what is written into the cache changes."""
_HEAD_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class OpenVinoModel:
    """A folder that holds the IR, and the shape of its network."""

    folder: Path
    config: NetworkConfig
    weights_bytes: int


def prepare_model(source: ModelSource) -> OpenVinoModel:
    """Find or make the IR of `source`. Raises ConfigError where the library cannot read the model.

    A folder must hold `openvino_model.xml` beside its config.json; GenAI converts no safetensors.
    """
    if source.format is ModelFormat.GGUF:
        file = GGUFFile(source.path)
        embedding = file.tensors.get("token_embd.weight")
        vocab_size = embedding.shape[0] if embedding else 1
        config = config_from_gguf(file.metadata, vocab_size, frozenset(file.tensors))
        folder = _cached_ir(file, config)
    else:
        folder = source.path
        if not (folder / IR_NAME).is_file():
            raise ConfigError(
                f"engine.kind: the openvino engine needs {IR_NAME} in {folder.name}; run:"
                f" optimum-cli export openvino --model {folder} FOLDER, or set engine.kind: native",
                param="engine.kind",
            )
        config = load_hugging_face_config(folder)
    weights_bytes = (folder / IR_NAME).with_suffix(".bin").stat().st_size
    return OpenVinoModel(folder, config, weights_bytes)


def _cached_ir(file: GGUFFile, config: NetworkConfig) -> Path:
    folder = cache_folder("openvino") / f"{file.path.stem}-{_fingerprint(file.path)}"
    if (folder / IR_NAME).is_file():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix="making-") as making:
            _convert(file, config, Path(making))
            _publish(Path(making), folder)
    except OSError as error:
        raise ConfigError(
            f"model.path: cannot keep OpenVINO's form of {file.path.name} in {folder.parent}:"
            f" {error.strerror or error}; set XDG_CACHE_HOME to a folder with room",
            param="model.path",
        ) from None
    return folder


def _publish(making: Path, folder: Path) -> None:
    """Put the finished folder in place at once; of two that were made at a time, one stays."""
    finished = Path(tempfile.mkdtemp(dir=folder.parent, prefix="made-"))
    try:
        for name in (IR_NAME, Path(IR_NAME).with_suffix(".bin").name):
            os.replace(making / name, finished / name)
        os.rename(finished, folder)
    except OSError:
        shutil.rmtree(finished, ignore_errors=True)
        if not (folder / IR_NAME).is_file():
            raise


def _fingerprint(path: Path) -> str:
    """Change with the file, OpenVINO's version and this conversion, without reading all of it."""
    stat = path.stat()
    digest = hashlib.sha256(f"{_CONVERSION} {openvino_version()} {stat.st_size}".encode())
    digest.update(str(stat.st_mtime_ns).encode())
    with path.open("rb") as handle:
        digest.update(handle.read(_HEAD_BYTES))
    return digest.hexdigest()[:16]


def _convert(file: GGUFFile, config: NetworkConfig, making: Path) -> None:
    """Let GenAI read the file and save its IR into `making`; then put the fractional zeros in."""
    openvino, genai = import_openvino()
    # The IR lands beside the file that is read: a link keeps it out of the model's own folder.
    link = making / "model.gguf"
    link.symlink_to(file.path.resolve())
    scheduler = genai.SchedulerConfig()
    scheduler.num_kv_blocks = 1
    try:
        genai.ContinuousBatchingPipeline(link, scheduler, "CPU", {"enable_save_ov_model": True})
    except RuntimeError as error:
        raise ConfigError(
            f"model.path: OpenVINO cannot read {file.path.name}: {last_line(error)};"
            " set engine.kind: native",
            param="model.path",
        ) from None
    saved = making / IR_NAME
    if not saved.is_file():
        raise ConfigError(
            f"model.path: OpenVINO saved no IR of {file.path.name}; set engine.kind: native",
            param="model.path",
        )
    model = openvino.Core().read_model(saved)
    num_exact, num_rounded = _put_zeros(model, dict(_zeros_by_scales(file, config)))
    if num_rounded:
        _LOG.warning(
            "OpenVINO's form of %s rounds the zero points of %d of %d weights: answers will be"
            " worse than the native engine's",
            file.path.name,
            num_rounded,
            num_exact + num_rounded,
        )
    exact = making / "exact.xml"
    openvino.save_model(model, exact, compress_to_fp16=False)
    del model  # it maps the files that are replaced now
    os.replace(exact.with_suffix(".bin"), saved.with_suffix(".bin"))
    os.replace(exact, saved)


def _zeros_by_scales(
    file: GGUFFile, config: NetworkConfig
) -> Iterator[tuple[bytes, np.ndarray[Any, np.dtype[np.float16]]]]:
    """Yield (float16 scales as bytes, float16 zeros) of each 4-bit matrix.

    The IR's constants bear no names of the file's, but their scales are the same numbers. The q and
    k of a llama file come in both orders of their rows: the reader may put them in order.
    """
    source = GGUFSource(file, config)
    for name in source.names():
        weight = source.read(name)
        if not isinstance(weight, PackedRows):
            continue
        groups = weight.unpack()
        if not isinstance(groups, QuantizedWeight) or groups.bits != 4:
            continue
        scales, offsets = groups.scales.numpy(), groups.offsets.numpy()
        zeros = -offsets / np.where(scales == 0, 1, scales)
        yield scales.astype(np.float16).tobytes(), zeros.astype(np.float16)
        if "q_proj" in name or "k_proj" in name:
            heads = config.num_heads if "q_proj" in name else config.num_kv_heads
            back = np.argsort(half_split_rows(heads, config.head_dim).numpy())
            yield scales[back].astype(np.float16).tobytes(), zeros[back].astype(np.float16)


def _put_zeros(
    model: Any, zeros: dict[bytes, np.ndarray[Any, np.dtype[np.float16]]]
) -> tuple[int, int]:
    """Replace each uint4 zero point by its float16 value; returns (replaced, left as they were).

    A weight is Multiply(Subtract(codes, Convert(zero points)), scales).
    """
    openvino, _ = import_openvino()
    opset = importlib.import_module("openvino.opset13")
    num_exact = num_rounded = 0
    for node in model.get_ordered_ops():
        if node.get_type_name() != "Subtract":
            continue
        convert = node.input_value(1).get_node()
        if convert.get_type_name() != "Convert":
            continue
        constant = convert.input_value(0).get_node()
        if (
            constant.get_type_name() != "Constant"
            or constant.get_element_type() != openvino.Type.u4
        ):
            continue
        (target,) = node.output(0).get_target_inputs()
        scales = target.get_node().input_value(1).get_node()
        is_known = scales.get_type_name() == "Constant"
        exact = zeros.get(scales.get_data().tobytes()) if is_known else None
        if exact is None:
            num_rounded += 1
            continue
        num_exact += 1
        if (exact == np.rint(exact)).all():  # Q4_0: whole numbers are what the reader keeps
            continue
        values = exact.reshape(list(constant.get_output_shape(0)))
        replacement = opset.constant(values, dtype=np.float16)
        node.input(1).replace_source_output(replacement.output(0))
    return num_exact, num_rounded


def last_line(error: Exception) -> str:
    """Return the end of an error of OpenVINO's: the lines before tell where in its sources."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
