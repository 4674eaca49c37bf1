"""Tensor parallelism of a dense network: its layers cut across the cards of one machine.

After Megatron-LM (https://arxiv.org/abs/1909.08053, section 3)::

    x ─ q, k, v by rows (heads) ─ attention over own heads ─ o by columns ─ sum over ranks ─
      ─ gate, up by rows ─ silu · mul ─ down by columns ─ sum over ranks ─

So a layer needs two sums, the KV cache holds a rank's own heads only, and embedding, norms and head
are whole on every rank.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from serve_app.core.errors import ConfigError
from serve_app.models.config import NetworkConfig
from serve_app.models.gguf import BLOCK_LAYOUT
from serve_app.models.loading.read_ahead import Span
from serve_app.models.loading.source import FileSource
from serve_app.models.packed import PackedRows
from serve_app.models.quantized import GROUP_SIZE, QuantizedWeight

_BY_ROWS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
_BY_COLUMNS = ("o_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class Shard:
    """Which part of a network this process holds."""

    rank: int
    num_ranks: int

    def part(self, size: int) -> slice:
        """This rank's share of `size` rows or columns."""
        share = size // self.num_ranks
        return slice(self.rank * share, (self.rank + 1) * share)


def shard_config(config: NetworkConfig, shard: Shard) -> NetworkConfig:
    """The config of a rank's part: its heads, its share of the MLP. Raises ConfigError."""
    if config.latent is not None or config.mixture is not None:
        raise _indivisible(shard, f"is {config.architecture}; only dense networks can be")
    for name in ("num_heads", "num_kv_heads", "intermediate_size"):
        if getattr(config, name) % shard.num_ranks:
            raise _indivisible(shard, f"has {name} = {getattr(config, name)}")
    return replace(
        config,
        num_heads=config.num_heads // shard.num_ranks,
        num_kv_heads=config.num_kv_heads // shard.num_ranks,
        intermediate_size=config.intermediate_size // shard.num_ranks,
    )


class ShardedSource:
    """A rank's part of another `WeightSource`: of a mapped file only that part is read."""

    def __init__(self, source: FileSource, shard: Shard) -> None:
        self.file_name = source.file_name
        self._source = source
        self._shard = shard
        self.total_bytes = sum(self.nbytes(name) for name in source.names())

    def names(self) -> frozenset[str]:
        """All weights, by transformers' names."""
        return self._source.names()

    def spans(self, name: str) -> tuple[Span, ...]:
        """Where the whole weight lies."""
        return self._source.spans(name)

    def nbytes(self, name: str) -> int:
        """Bytes of the part in the file."""
        whole = self._source.nbytes(name)
        is_cut = _layer_of(name) in _BY_ROWS or _is_by_columns(name)
        return whole // self._shard.num_ranks if is_cut else whole

    def read(self, name: str) -> torch.Tensor | PackedRows | QuantizedWeight:
        """The part. A bias after a sum over ranks is the first rank's; the others have zeros."""
        weight = self._source.read(name)
        if _layer_of(name) in _BY_ROWS:
            return _rows(weight, self._shard.part(weight.shape[0]))
        if _is_by_columns(name):
            return self._columns(name, weight)
        if _layer_of(name) in _BY_COLUMNS and self._shard.rank:
            assert isinstance(weight, torch.Tensor)
            return torch.zeros_like(weight)
        return weight

    def _columns(
        self, name: str, weight: torch.Tensor | PackedRows | QuantizedWeight
    ) -> torch.Tensor | PackedRows | QuantizedWeight:
        part = self._shard.part(weight.shape[1])
        if isinstance(weight, torch.Tensor):
            return weight[:, part].contiguous()
        if isinstance(weight, PackedRows):
            block, block_bytes = BLOCK_LAYOUT[weight.ggml_type]
            self._check_groups(name, part, block)
            data = weight.data[
                :, part.start // block * block_bytes : part.stop // block * block_bytes
            ]
            return PackedRows(weight.ggml_type, data)
        self._check_groups(name, part, GROUP_SIZE)
        groups = slice(part.start // GROUP_SIZE, part.stop // GROUP_SIZE)
        return QuantizedWeight(
            weight.bits,
            weight.codes[:, part].contiguous(),
            weight.scales[:, groups].contiguous(),
            weight.offsets[:, groups].contiguous(),
        )

    def _check_groups(self, name: str, part: slice, group_size: int) -> None:
        if (part.stop - part.start) % group_size:
            columns = part.stop - part.start
            what = f"has {name}, whose {columns} columns per card cut groups of {group_size}"
            raise _indivisible(self._shard, what)


def _rows(
    weight: torch.Tensor | PackedRows | QuantizedWeight, part: slice
) -> torch.Tensor | PackedRows | QuantizedWeight:
    if isinstance(weight, torch.Tensor):
        return weight[part]
    if isinstance(weight, PackedRows):
        return PackedRows(weight.ggml_type, weight.data[part])
    return QuantizedWeight(
        weight.bits, weight.codes[part], weight.scales[part], weight.offsets[part]
    )


def _layer_of(name: str) -> str:
    return name.rsplit(".", 2)[-2]


def _is_by_columns(name: str) -> bool:
    return _layer_of(name) in _BY_COLUMNS and name.endswith(".weight")


def _indivisible(shard: Shard, what: str) -> ConfigError:
    return ConfigError(
        f"engine.tensor_parallel_size: the model cannot be cut into {shard.num_ranks} parts: it"
        f" {what}; set tensor_parallel_size to a divisor, or to 1",
        param="engine.tensor_parallel_size",
    )
