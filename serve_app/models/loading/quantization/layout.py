"""What a format of quantized checkpoints tells the loader: its tensors, and what they mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from serve_app.models.config import UnsupportedArchitectureError
from serve_app.models.quantized import QuantizedWeight


class LayoutError(ValueError):
    """A layer's tensors do not fit each other; the source adds the layer's name."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The tensors of one quantized layer, as suffixes of its name.

    A layer is quantized where it has `marker`; then `required` must be there too, and `optional`
    may be. `ignored` tensors belong to a layer without a meaning for its weight.
    """

    marker: str
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()

    @property
    def suffixes(self) -> tuple[str, ...]:
        """All suffixes that `unpack` may be given."""
        return (self.marker, *self.required, *self.optional)


class QuantizationFormat(Protocol):
    """One format, set up from a checkpoint's quantization_config."""

    layout: Layout

    def unpack(
        self, parts: Mapping[str, torch.Tensor], dtype: torch.dtype
    ) -> QuantizedWeight | torch.Tensor:
        """The weight [N, K] from a layer's tensors by suffix, where they are.

        Dense, in `dtype`, where groups of 32 columns cannot hold it exactly. Raises LayoutError.
        """
        ...


def unsupported(what: str, known: str) -> UnsupportedArchitectureError:
    """The one line for a variant that is not read; `known` names what is."""
    return UnsupportedArchitectureError(
        f"model.path: the native engine does not read {what}; it reads {known}:"
        " set engine.kind: transformers, or take a checkpoint in one of these",
        param="model.path",
    )
