"""Logits of a whole text from the network that the openvino engine runs.

The engine's pipeline shows no logits but through the tokens that it draws, so its IR is compiled
here by itself, with the engine's properties: the same weights, products and types, without pages.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from serve_app.config.model_source import ModelFormat, ModelSource
from serve_app.config.schema import EngineSection
from serve_app.core.errors import ConfigError
from serve_app.engine.openvino_model import IR_NAME, last_line, prepare_model
from serve_app.engine.openvino_runtime import import_openvino, openvino_device
from serve_app.engine.openvino_settings import plugin_properties


class OpenVinoScorer:
    """A .gguf file, or a folder with OpenVINO's IR beside its config.json; see `Scorer`."""

    engine = "openvino"

    def __init__(self, path: Path, device: str, section: EngineSection) -> None:
        """Compile it. Raises ConfigError, one line, where OpenVINO cannot read or run it."""
        target = openvino_device(device)
        kind = ModelFormat.GGUF if path.is_file() else ModelFormat.HUGGING_FACE
        model = prepare_model(ModelSource(path.stem, path, kind))
        properties = plugin_properties(section, target)
        openvino, _ = import_openvino()
        try:
            compiled = openvino.Core().compile_model(model.folder / IR_NAME, target, properties)
            self._request = compiled.create_infer_request()
        except RuntimeError as error:
            raise ConfigError(
                f"model: OpenVINO cannot run {path.name} on {target}: {last_line(error)}",
                param="model",
            ) from None
        self._inputs = {name for each in compiled.inputs for name in each.names}
        self.vocab_size = model.config.vocab_size
        self.max_position = model.config.max_position
        self.weights_bytes = model.weights_bytes
        precision = compiled.get_property("INFERENCE_PRECISION_HINT")
        self.dtype = str(precision.to_string())

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """See `Scorer`."""
        self._request.reset_state()
        return self._infer(ids, ids.shape[0])

    def decode_tokens_per_s(self, ids: torch.Tensor, num_tokens: int) -> float:
        """See `Scorer`; one token at a time from the state of those before."""
        token = self.logits(ids)[-1:].argmax(-1)
        started = time.perf_counter()
        for length in range(ids.shape[0] + 1, ids.shape[0] + num_tokens + 1):
            token = self._infer(token, length)[-1:].argmax(-1)
        return num_tokens / max(time.perf_counter() - started, 1e-9)

    def _infer(self, ids: torch.Tensor, length: int) -> torch.Tensor:
        """Run int64 [T], the last T of `length` tokens → float32 [T, vocab]."""
        count = ids.shape[0]
        values: dict[str, Any] = {
            "input_ids": ids[None].numpy(),
            "attention_mask": np.ones((1, length), dtype=np.int64),
            "position_ids": np.arange(length - count, length, dtype=np.int64)[None],
            "beam_idx": np.zeros(1, dtype=np.int32),
        }
        given = {name: value for name, value in values.items() if name in self._inputs}
        found = self._request.infer(given)["logits"]
        return torch.from_numpy(found[0].astype(np.float32))
