"""Weights from a Hugging Face folder: one model.safetensors, or shards with their index."""

from __future__ import annotations

import json
import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from serve_app.core.errors import ConfigError
from serve_app.models.config import read_json
from serve_app.models.loading.read_ahead import Span

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_BARE_EMBEDDING = "embed_tokens.weight"
"""What a checkpoint of the layers alone (embedding models') calls `model.embed_tokens.weight`."""
_MAX_HEADER_BYTES = 100 * 1024 * 1024
_NEURAL_COMPRESSOR = "quantized_weight.pt"
STORED_TYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}
"""The format's names of the types that weights and their quantization are stored in."""

FLOAT_TYPES = (torch.float32, torch.float16, torch.bfloat16)
"""What a plain weight may be stored in."""

_PLAIN_TYPES = {name: dtype for name, dtype in STORED_TYPES.items() if dtype in FLOAT_TYPES}


@dataclass(frozen=True, slots=True)
class _Entry:
    shard: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int


class SafetensorsSource:
    """A `WeightSource` over mapped files: reading a weight copies nothing.

    Format: https://github.com/huggingface/safetensors#format (8 bytes of header length, a JSON
    header, the tensors). Raises ConfigError, one line, on a missing, truncated or damaged file.
    """

    def __init__(
        self, folder: Path, stored_types: Mapping[str, torch.dtype] = _PLAIN_TYPES
    ) -> None:
        self.file_name = folder.name
        self._folder = folder
        self._stored_types = stored_types
        self._maps: dict[str, torch.Tensor] = {}
        self._entries: dict[str, _Entry] = {}
        for shard in self._shards():
            self._add(shard)
        self._check_index()
        if _BARE_EMBEDDING in self._entries:
            self._entries = {f"model.{name}": entry for name, entry in self._entries.items()}
        self.total_bytes = sum(entry.nbytes for entry in self._entries.values())

    def names(self) -> frozenset[str]:
        """All weights of all shards."""
        return frozenset(self._entries)

    def nbytes(self, name: str) -> int:
        """Bytes of weight `name`."""
        return self._entries[name].nbytes

    def dtype(self, name: str) -> torch.dtype:
        """The type that weight `name` is stored in."""
        return self._entries[name].dtype

    def read(self, name: str) -> torch.Tensor:
        """A view of the mapped shard."""
        entry = self._entries[name]
        data = self._maps[entry.shard][entry.start : entry.start + entry.nbytes]
        # A shard need not align its tensors; torch's kernels want at least their element's size.
        if data.data_ptr() % entry.dtype.itemsize:
            data = data.clone()
        return data.view(entry.dtype).view(entry.shape)

    def spans(self, name: str) -> tuple[Span, ...]:
        """Where weight `name` lies."""
        entry = self._entries[name]
        return (Span(self._folder / entry.shard, entry.start, entry.nbytes),)

    def _shards(self) -> list[str]:
        if (self._folder / _SINGLE).is_file():
            return [_SINGLE]
        if (self._folder / _INDEX).is_file():
            return sorted(set(self._weight_map().values()))
        if (self._folder / _NEURAL_COMPRESSOR).is_file():
            raise ConfigError(
                f"model.path: {self.file_name} holds neural-compressor's {_NEURAL_COMPRESSOR}, a"
                " pickle, which may run code when it is read; save the model again with"
                ' save(model, folder, format="huggingface")',
                param="model.path",
            )
        raise ConfigError(
            f"model.path: {self.file_name} has neither {_SINGLE} nor {_INDEX};"
            " name a folder with safetensors weights, or set engine.kind: transformers",
            param="model.path",
        )

    def _weight_map(self) -> dict[str, str]:
        weight_map = read_json(self._folder / _INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(
            isinstance(shard, str) and Path(shard).name == shard for shard in weight_map.values()
        ):
            raise self._damaged(_INDEX, "its weight_map is no map of weights to files")
        return weight_map

    def _check_index(self) -> None:
        if (self._folder / _SINGLE).is_file():
            return
        for name, shard in self._weight_map().items():
            if name not in self._entries or self._entries[name].shard != shard:
                raise self._damaged(shard, f"it lacks {name}, which the index promises")

    def _add(self, shard: str) -> None:
        data = self._map(shard)
        size = data.numel()
        if size < 8:
            raise self._damaged(shard, "it is truncated")
        (header_bytes,) = struct.unpack("<Q", bytes(data[:8].tolist()))
        if header_bytes > min(size - 8, _MAX_HEADER_BYTES):
            raise self._damaged(shard, "it is truncated or no safetensors file")
        try:
            header = json.loads(data[8 : 8 + header_bytes].numpy().tobytes())
            entries = {name: value for name, value in header.items() if name != "__metadata__"}
            for name, value in entries.items():
                self._entries[name] = self._entry(shard, name, value, 8 + header_bytes, size)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise self._damaged(shard, "its header is not valid") from None

    def _entry(self, shard: str, name: str, value: dict[str, Any], base: int, size: int) -> _Entry:
        begin, end = value["data_offsets"]
        shape = tuple(int(dim) for dim in value["shape"])
        dtype = self._stored_types.get(value["dtype"])
        if dtype is None:
            raise ConfigError(
                f"model.path: {shard} stores {name} as {value['dtype']}; the native engine reads"
                f" {', '.join(self._stored_types)}: set engine.kind: transformers",
                param="model.path",
            )
        if name in self._entries:
            raise self._damaged(shard, f"{name} is also in {self._entries[name].shard}")
        if not 0 <= begin <= end or end - begin != math.prod(shape) * dtype.itemsize:
            raise self._damaged(shard, f"the size of {name} does not fit its shape")
        if base + end > size:
            raise self._damaged(
                shard, f"it is truncated: {name} ends at byte {base + end} of {size}"
            )
        return _Entry(shard, dtype, shape, base + begin, end - begin)

    def _map(self, shard: str) -> torch.Tensor:
        try:
            with (self._folder / shard).open("rb") as file:
                # Copy-on-write: torch wants a writable buffer, and the file stays as it is.
                mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "the file is empty"
            raise self._damaged(shard, reason or str(error)) from None
        self._maps[shard] = torch.frombuffer(mapping, dtype=torch.uint8)
        return self._maps[shard]

    def _damaged(self, shard: str, what: str) -> ConfigError:
        return ConfigError(
            f"model.path: cannot read {self.file_name}/{shard}: {what}; copy it again",
            param="model.path",
        )
