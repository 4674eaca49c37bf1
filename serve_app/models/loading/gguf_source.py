"""Weights from a GGUF file, under transformers' names and in transformers' row order."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import torch

from serve_app.core.errors import ConfigError
from serve_app.models.config import NetworkConfig
from serve_app.models.gguf import GGMLType, GGUFFile, GGUFTensorInfo
from serve_app.models.loading.gguf_names import (
    canonical_name,
    expert_name,
    layer_of,
    split_up_name,
)
from serve_app.models.loading.read_ahead import Span
from serve_app.models.loading.sparse_shapes import shared_prefix
from serve_app.models.packed import PACKED_TYPES, PackedRows
from serve_app.models.quantized import QuantizedWeight

ROPE_FACTORS = "rope_freqs.weight"
"""GGUF tensor [rope_dim / 2] by which frequencies are divided: llama3 scaling, worked out."""

_DTYPES = {
    GGMLType.F32: torch.float32,
    GGMLType.F16: torch.float16,
    GGMLType.BF16: torch.bfloat16,
}
_PERMUTED = re.compile(r"self_attn\.([qk])_proj\.(weight|bias)$")
_SHARED_GATE = "mlp.shared_expert_gate.weight"
_STACKED_DIMS = 3


@dataclass(frozen=True, slots=True)
class _SplitUp:
    """`kv_b_proj` in two: `key` [heads, rank, nope], transposed for absorption, and `value`
    [heads, value, rank]."""

    key: GGUFTensorInfo
    value: GGUFTensorInfo


class GGUFSource:
    """A `WeightSource` over a mapped GGUF file; ConfigError on a type that it cannot read."""

    def __init__(self, file: GGUFFile, config: NetworkConfig) -> None:
        self.file_name = file.path.name
        self._file = file
        self._config = config
        self._infos: dict[str, GGUFTensorInfo] = {}
        self._split_ups: dict[str, _SplitUp] = {}
        self._name_tensors()
        self.total_bytes = sum(self.nbytes(name) for name in self.names())

    def names(self) -> frozenset[str]:
        """All weights; names that are not known stay GGUF's."""
        return frozenset(self._infos) | frozenset(self._split_ups)

    def nbytes(self, name: str) -> int:
        """Bytes of weight `name` in the file."""
        return sum(span.nbytes for span in self.spans(name))

    def spans(self, name: str) -> tuple[Span, ...]:
        """Where weight `name` lies."""
        split = self._split_ups.get(name)
        infos = (split.key, split.value) if split else (self._infos[name],)
        return tuple(Span(self._file.path, info.offset, info.nbytes) for info in infos)

    def read(self, name: str) -> torch.Tensor | PackedRows:
        """A view of the file; the rows of a llama file's q and k are put in order, still packed.

        The two halves of a split `kv_b_proj` are put together, in float32.
        """
        if name in self._split_ups:
            return self._join(self._split_ups[name])
        weight = self._view(self._infos[name])
        if name.endswith(_SHARED_GATE) and isinstance(weight, torch.Tensor):
            return weight.reshape(1, -1)  # the file has it as a vector
        match = _PERMUTED.search(name)
        if match is None or self._config.architecture != "llama":
            return weight
        is_query = match.group(1) == "q"
        num_heads = self._config.num_heads if is_query else self._config.num_kv_heads
        rows = half_split_rows(num_heads, self._config.head_dim)
        return weight.select(rows) if isinstance(weight, PackedRows) else weight[rows]

    def release(self) -> None:
        """Let go of the pages that were read: weights have been copied, but for looked-up rows."""
        self._file.release_pages()

    def rope_factors(self) -> torch.Tensor | None:
        """Divisors of the rotary frequencies, float32 [rope_dim / 2], where the file has them."""
        info = self._file.tensors.get(ROPE_FACTORS)
        if info is None:
            return None
        self._check_type(info)
        factors = self._view(info)
        if isinstance(factors, PackedRows) or factors.numel() != self._config.rope_dim // 2:
            raise ConfigError(
                f"model.path: {self.file_name} has {ROPE_FACTORS} of shape {list(info.shape)},"
                f" where {self._config.rope_dim // 2} numbers are needed; convert the model again",
                param="model.path",
            )
        return factors.float()

    def _name_tensors(self) -> None:
        """Fill the tables: a stacked tensor of experts counts as one weight per expert."""
        prefix = shared_prefix(self._config)
        halves: dict[str, dict[str, GGUFTensorInfo]] = {}
        for name, info in self._file.tensors.items():
            layer = layer_of(name)
            if name == ROPE_FACTORS:
                continue
            if layer is not None and layer >= self._config.num_layers:
                # Layers that predict further tokens: named as such, never read.
                self._infos[f"model.layers.{name.removeprefix('blk.')}"] = info
                continue
            self._check_type(info)
            if expert_name(name, 0) is not None and len(info.shape) == _STACKED_DIMS:
                self._infos |= {
                    str(expert_name(name, expert)): _slice(info, expert)
                    for expert in range(info.shape[0])
                }
            elif (joined := split_up_name(name)) is not None:
                halves.setdefault(joined, {})["key" if "_k_b." in name else "value"] = info
            else:
                self._infos[canonical_name(name, prefix)] = info
        for joined, parts in halves.items():
            if len(parts) == 2 and all(len(i.shape) == _STACKED_DIMS for i in parts.values()):
                self._split_ups[joined] = _SplitUp(**parts)

    def _join(self, split: _SplitUp) -> torch.Tensor:
        """[heads · (nope + value), rank], as transformers has it."""
        key, value = (
            _dense(self._view(_flat(info))).view(info.shape) for info in (split.key, split.value)
        )
        return torch.cat((key.transpose(1, 2), value), dim=1).flatten(0, 1)

    def _view(self, info: GGUFTensorInfo) -> torch.Tensor | PackedRows:
        data = torch.from_numpy(self._file.bytes_of(info))
        if info.ggml_type in PACKED_TYPES:
            return PackedRows(info.ggml_type, data.view(info.shape[0], -1))
        return data.view(_DTYPES[info.ggml_type]).view(info.shape)

    def _check_type(self, info: GGUFTensorInfo) -> None:
        is_packed = info.ggml_type in PACKED_TYPES and len(info.shape) in (2, _STACKED_DIMS)
        if not is_packed and info.ggml_type not in _DTYPES:
            known = ", ".join(t.name for t in (*_DTYPES, *PACKED_TYPES))
            raise ConfigError(
                f"model.path: {self.file_name} stores {info.name} as {info.ggml_type.name};"
                f" the native engine reads {known}: convert the model to one of them",
                param="model.path",
            )


def _slice(info: GGUFTensorInfo, index: int) -> GGUFTensorInfo:
    """One matrix of a stack [number, rows, columns]."""
    nbytes = info.nbytes // info.shape[0]
    offset = info.offset + index * nbytes
    return replace(info, shape=info.shape[1:], offset=offset, nbytes=nbytes)


def _flat(info: GGUFTensorInfo) -> GGUFTensorInfo:
    """A stack as one matrix [number · rows, columns]."""
    return replace(info, shape=(info.shape[0] * info.shape[1], info.shape[2]))


def _dense(weight: torch.Tensor | PackedRows) -> torch.Tensor:
    unpacked = weight.unpack() if isinstance(weight, PackedRows) else weight
    if isinstance(unpacked, QuantizedWeight):
        return unpacked.dequantize(torch.float32)
    return unpacked.float()


def half_split_rows(num_heads: int, head_dim: int) -> torch.Tensor:
    """Where rows of transformers' order lie in a llama GGUF file, int64 [heads * head_dim].

    The file interleaves the two halves of each head (its rotary turns neighbouring pairs):
    transformers' row j of the first half is the file's row 2j, of the second half 2j + 1.
    """
    rows = torch.arange(num_heads * head_dim).view(num_heads, head_dim // 2, 2)
    return rows.transpose(1, 2).reshape(-1)
