"""QuantizedSource: a folder's quantized layers as weights under transformers' names."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch

from serve_app.core.errors import ConfigError
from serve_app.models.loading.quantization.layout import LayoutError, QuantizationFormat
from serve_app.models.loading.read_ahead import Span
from serve_app.models.loading.safetensors_source import FLOAT_TYPES, SafetensorsSource
from serve_app.models.quantized import QuantizedWeight

_LOG = logging.getLogger(__name__)
_WEIGHT = ".weight"
_BIAS = ".bias"


class QuantizedSource:
    """A `WeightSource` that puts each quantized layer together from its tensors, on `device`.

    The tensors travel to the device as they are stored and are unpacked there. Which layers are
    quantized is told by their tensors, so layers left alone (`modules_to_not_convert`, `ignore`, a
    dense head) need no list. A weight that cannot stay packed is dense, in `dtype`.

    Raises ConfigError, one line, on tensors that are missing or do not fit each other.
    """

    def __init__(
        self,
        raw: SafetensorsSource,
        quantization: QuantizationFormat,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.file_name = raw.file_name
        self._raw = raw
        self._format = quantization
        self._device = device
        self._dtype = dtype
        self._has_told = False
        self._layers, left = self._sort(raw.names())
        self._plain = self._checked(left)
        self.total_bytes = sum(self.nbytes(name) for name in self.names())

    def names(self) -> frozenset[str]:
        """All weights; tensors of the format that belong to no layer keep their own names."""
        return frozenset(self._layers) | self._plain

    def nbytes(self, name: str) -> int:
        """Bytes of the weight in the files, with its scales and zeros."""
        return sum(self._raw.nbytes(part) for part in self._layers.get(name, {"": name}).values())

    def spans(self, name: str) -> tuple[Span, ...]:
        """Where the tensors of weight `name` lie."""
        parts = self._layers.get(name, {"": name}).values()
        return tuple(span for part in parts for span in self._raw.spans(part))

    def drop_empty_biases(self, expected: Iterable[str]) -> None:
        """Forget biases that no layer of the network has, where they are all zero.

        AutoGPTQ and neural-compressor write them for every layer; others stay and are an error.
        """
        layers = {name.removesuffix(_WEIGHT) for name in self._layers}
        unknown = self._plain - frozenset(expected)
        empty = {
            name
            for name in unknown
            if name.endswith(_BIAS)
            and name.removesuffix(_BIAS) in layers
            and not self._raw.read(name).any()
        }
        self.total_bytes -= sum(self._raw.nbytes(name) for name in empty)
        self._plain -= empty

    def read(self, name: str) -> QuantizedWeight | torch.Tensor:
        """The weight, unpacked on the device; a plain one is a view of the mapped file."""
        if name not in self._layers:
            return self._raw.read(name)
        parts = {
            suffix: self._raw.read(part).to(self._device)
            for suffix, part in self._layers[name].items()
        }
        try:
            weight = self._format.unpack(parts, self._dtype)
        except LayoutError as error:
            raise self._damaged(name, str(error)) from None
        if isinstance(weight, torch.Tensor) and not self._has_told:
            self._has_told = True
            _LOG.warning(
                "%s: %s and others like it are held as %s, as their layout is none of the packed"
                " kernels'",
                self.file_name,
                name,
                str(self._dtype).removeprefix("torch."),
            )
        return weight

    def _sort(self, names: frozenset[str]) -> tuple[dict[str, dict[str, str]], set[str]]:
        """Each quantized weight's tensors by suffix, and the tensors that are left."""
        layout = self._format.layout
        layers: dict[str, dict[str, str]] = {}
        left = set(names)
        for name in names:
            if not name.endswith(layout.marker):
                continue
            layer = name.removesuffix(layout.marker)
            parts = {
                suffix: layer + suffix for suffix in layout.suffixes if layer + suffix in names
            }
            for suffix in layout.required:
                if suffix not in parts:
                    raise self._damaged(layer, f"it lacks {layer + suffix}")
            layers[layer + _WEIGHT] = parts
            left -= {*parts.values(), *(layer + suffix for suffix in layout.ignored)}
        for weight, parts in layers.items():
            if weight in left and weight not in parts.values():
                raise self._damaged(weight, "it has the layer both quantized and dense")
        return layers, left

    def _checked(self, plain: set[str]) -> frozenset[str]:
        for name in sorted(plain):
            if self._raw.dtype(name) not in FLOAT_TYPES:
                marker = self._format.layout.marker
                raise self._damaged(
                    name, f"it is {self._raw.dtype(name)} without the {marker} that belongs to it"
                )
        return frozenset(plain)

    def _damaged(self, name: str, what: str) -> ConfigError:
        return ConfigError(
            f"model.path: cannot read {name} of {self.file_name}: {what}; copy it again, or"
            " compare its quantization_config",
            param="model.path",
        )
