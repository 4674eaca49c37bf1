"""Weights from a GGUF file, under transformers' names and in transformers' row order."""

from __future__ import annotations

import re

import torch

from serve_app.core.errors import ConfigError
from serve_app.models.config import NetworkConfig
from serve_app.models.gguf import GGMLType, GGUFFile, GGUFTensorInfo
from serve_app.models.loading.read_ahead import Span
from serve_app.models.loading.source import EMBEDDING, FINAL_NORM, HEAD
from serve_app.models.packed import PACKED_TYPES, PackedRows

ROPE_FACTORS = "rope_freqs.weight"
"""GGUF tensor [rope_dim / 2] by which frequencies are divided: llama3 scaling, worked out."""

_DTYPES = {
    GGMLType.F32: torch.float32,
    GGMLType.F16: torch.float16,
    GGMLType.BF16: torch.bfloat16,
}
_TOP = {"token_embd.weight": EMBEDDING, "output_norm.weight": FINAL_NORM, "output.weight": HEAD}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_PERMUTED = re.compile(r"self_attn\.([qk])_proj\.(weight|bias)$")


class GGUFSource:
    """A `WeightSource` over a mapped GGUF file; ConfigError on a type that it cannot read."""

    def __init__(self, file: GGUFFile, config: NetworkConfig) -> None:
        self.file_name = file.path.name
        self._file = file
        self._config = config
        self._infos = {
            canonical_name(name): info
            for name, info in file.tensors.items()
            if name != ROPE_FACTORS
        }
        for info in self._infos.values():
            self._check_type(info)
        self.total_bytes = sum(info.nbytes for info in self._infos.values())

    def names(self) -> frozenset[str]:
        """All weights; names that are not known stay GGUF's."""
        return frozenset(self._infos)

    def nbytes(self, name: str) -> int:
        """Bytes of weight `name` in the file."""
        return self._infos[name].nbytes

    def spans(self, name: str) -> tuple[Span, ...]:
        """Where weight `name` lies."""
        info = self._infos[name]
        return (Span(self._file.path, info.offset, info.nbytes),)

    def read(self, name: str) -> torch.Tensor | PackedRows:
        """A view of the file; the rows of a llama file's q and k are put in order, still packed."""
        info = self._infos[name]
        weight = self._view(info)
        match = _PERMUTED.search(name)
        if match is None or self._config.architecture != "llama":
            return weight
        is_query = match.group(1) == "q"
        num_heads = self._config.num_heads if is_query else self._config.num_kv_heads
        rows = half_split_rows(num_heads, self._config.head_dim)
        return weight.select(rows) if isinstance(weight, PackedRows) else weight[rows]

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

    def _view(self, info: GGUFTensorInfo) -> torch.Tensor | PackedRows:
        data = torch.from_numpy(self._file.data(info.name))
        if info.ggml_type in PACKED_TYPES:
            return PackedRows(info.ggml_type, data.view(info.shape[0], -1))
        return data.view(_DTYPES[info.ggml_type]).view(info.shape)

    def _check_type(self, info: GGUFTensorInfo) -> None:
        is_packed = info.ggml_type in PACKED_TYPES and len(info.shape) == 2
        if not is_packed and info.ggml_type not in _DTYPES:
            known = ", ".join(t.name for t in (*_DTYPES, *PACKED_TYPES))
            raise ConfigError(
                f"model.path: {self.file_name} stores {info.name} as {info.ggml_type.name};"
                f" the native engine reads {known}: convert the model to one of them",
                param="model.path",
            )


def canonical_name(name: str) -> str:
    """The transformers name of a GGUF tensor; an unknown name stays as it is."""
    if name in _TOP:
        return _TOP[name]
    match = _BLOCK.fullmatch(name)
    if match is None or match.group(2) not in _LAYER:
        return name
    return f"model.layers.{match.group(1)}.{_LAYER[match.group(2)]}.{match.group(3)}"


def half_split_rows(num_heads: int, head_dim: int) -> torch.Tensor:
    """Where rows of transformers' order lie in a llama GGUF file, int64 [heads * head_dim].

    The file interleaves the two halves of each head (its rotary turns neighbouring pairs):
    transformers' row j of the first half is the file's row 2j, of the second half 2j + 1.
    """
    rows = torch.arange(num_heads * head_dim).view(num_heads, head_dim // 2, 2)
    return rows.transpose(1, 2).reshape(-1)
