"""A Hugging Face folder: its tensors read and written shard by shard, and its config."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from serve_app.core.errors import ConfigError

MAX_SHARD_BYTES = 4 << 30
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
_DROPPED = {"config.json", "quantize_config.json", "quantization_config.json", INDEX_FILE}


class FolderWriter:
    """Writes tensors into shards of at most `max_shard_bytes`, and their index on a clean end.

    One shard is named as transformers names a single file. Nothing is kept beyond one shard.
    """

    def __init__(self, folder: Path, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
        self._folder = folder
        self._limit = max_shard_bytes
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self.total_bytes = 0

    def __enter__(self) -> FolderWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self._finish()

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Append a tensor; it is copied to the CPU."""
        tensor = tensor.detach().to("cpu").contiguous()
        if self._pending and self._pending_bytes + tensor.nbytes > self._limit:
            self._flush()
        self._pending[name] = tensor
        self._pending_bytes += tensor.nbytes
        self.total_bytes += tensor.nbytes

    def _flush(self) -> None:
        number = len(self._shards)
        save_file(self._pending, self._part(number), metadata={"format": "pt"})
        self._shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0

    def _finish(self) -> None:
        if self._pending:
            self._flush()
        if len(self._shards) == 1:
            self._part(0).replace(self._folder / WEIGHTS_FILE)
            return
        weight_map = {}
        for number, names in enumerate(self._shards):
            shard = f"model-{number + 1:05}-of-{len(self._shards):05}.safetensors"
            self._part(number).replace(self._folder / shard)
            weight_map |= dict.fromkeys(names, shard)
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
        (self._folder / INDEX_FILE).write_text(json.dumps(index, indent=1) + "\n")

    def _part(self, number: int) -> Path:
        return self._folder / f"part-{number}.safetensors"


def read_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor of a folder's safetensors files, in the files' order."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                yield name, file.get_tensor(name)


def tensor_shapes(folder: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return (shape, type as safetensors names it) of every tensor of a folder, reading no weight.

    Raises ConfigError where the folder has no safetensors file.
    """
    shapes: dict[str, tuple[tuple[int, ...], str]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                part = file.get_slice(name)
                shapes[name] = (tuple(part.get_shape()), part.get_dtype())
    if not shapes:
        raise ConfigError(
            f"model: {folder.name} has no safetensors files; save the model in that format",
            param="model",
        )
    return shapes


def copy_companions(source: Path, target: Path) -> None:
    """Copy what lies beside the weights: tokenizer, chat template, generation config, licence."""
    for path in source.iterdir():
        if path.is_file() and path.suffix not in _WEIGHT_SUFFIXES and path.name not in _DROPPED:
            shutil.copyfile(path, target / path.name)


def write_config(source: Path, target: Path, quantization: dict[str, Any] | None) -> None:
    """Copy config.json, with `quantization` as its quantization_config (None: without any)."""
    values = json.loads((source / "config.json").read_text(encoding="utf-8"))
    values.pop("quantization_config", None)
    if quantization is not None:
        values["quantization_config"] = quantization
    text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    (target / "config.json").write_text(text, encoding="utf-8")


def folder_bytes(folder: Path) -> int:
    """Bytes of all files of a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
