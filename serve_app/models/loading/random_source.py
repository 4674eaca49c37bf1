"""Weights drawn at random on the device: a network of any shape, for measuring without a file."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import torch

from serve_app.models.config import NetworkConfig
from serve_app.models.interface import LoadedModel
from serve_app.models.loading.builder import WeightFormat
from serve_app.models.loading.loader import DTypeName, make_builder, make_policy
from serve_app.models.loading.source import expected_shapes
from serve_app.models.packed import PackedRows
from serve_app.models.quantized import GROUP_SIZE
from serve_app.models.rope import inverse_frequencies

_DEVIATION = 0.02
_PART_VALUES = 4 << 20


class RandomSource:
    """A `WeightSource` whose matrices are normal with deviation 0.02 and whose norms are 1.

    A weight depends on `seed` and its name alone. It is made when it is read, on `device` in
    `dtype`, so that nothing travels and at most one copy waits beside the network's own.
    """

    file_name = "random weights"

    def __init__(
        self, config: NetworkConfig, device: torch.device, dtype: torch.dtype, seed: int = 0
    ) -> None:
        self._shapes = expected_shapes(config)
        self._order = {name: index for index, name in enumerate(self._shapes)}
        self._device = device
        self._dtype = dtype
        self._seed = seed
        self.total_bytes = sum(self.nbytes(name) for name in self._shapes)

    def names(self) -> frozenset[str]:
        """All weights, by transformers' names."""
        return frozenset(self._shapes)

    def nbytes(self, name: str) -> int:
        """Bytes of `name` as `read` returns it."""
        return math.prod(self._shapes[name]) * self._dtype.itemsize

    def read(self, name: str) -> torch.Tensor | PackedRows:
        """The weight, made now."""
        shape = self._shapes[name]
        if name.endswith("norm.weight"):
            return torch.ones(shape, device=self._device, dtype=self._dtype)
        seed = self._seed * len(self._order) + self._order[name]
        weight = torch.empty(shape, device=self._device, dtype=self._dtype)
        if self._device.type != "cpu":
            generator = torch.Generator(self._device).manual_seed(seed)
            return weight.normal_(0.0, _DEVIATION, generator=generator)
        _draw_in_parts(weight.view(-1), seed)
        return weight


def _draw_in_parts(values: torch.Tensor, seed: int) -> None:
    """Fill a CPU's [n] with parts that are drawn side by side: ATen draws on one core alone."""
    parts = values.split(_PART_VALUES)
    generators = [torch.Generator().manual_seed(seed * len(parts) + i) for i in range(len(parts))]
    is_inference = torch.is_inference_mode_enabled()  # each thread has a mode of its own

    def draw(part: torch.Tensor, generator: torch.Generator) -> None:
        with torch.inference_mode(is_inference):
            part.normal_(0.0, _DEVIATION, generator=generator)

    with ThreadPoolExecutor(max_workers=torch.get_num_threads()) as threads:
        list(threads.map(draw, parts, generators))


def make_random_model(
    config: NetworkConfig,
    *,
    device: torch.device,
    dtype: DTypeName = "auto",
    weight_format: WeightFormat = "auto",
    group_size: int = GROUP_SIZE,
    seed: int = 0,
    source_device: torch.device | None = None,
) -> LoadedModel:
    """A network of this shape on `device`; see `load_model` for `dtype` and `weight_format`.

    `group_size` is the columns that share a scale where `weight_format` asks for fewer bits.

    The weights are drawn on `source_device`, by default `device`: each kind of device draws others.
    """
    policy = make_policy(config, device, dtype, weight_format, batch_invariant=False)
    source = RandomSource(config, source_device or device, policy.dtype, seed)
    builder = make_builder(config, source, policy, weight_format, group_size=group_size)
    with torch.no_grad():
        network = builder.build(*inverse_frequencies(config))
    return LoadedModel(
        network=network,
        name="random",
        architecture=config.architecture,
        dtype=policy.dtype,
        weights_bytes=builder.weights_bytes,
        weight_format=builder.weight_format,
        eos_token_ids=(),
        products=tuple(builder.products),
    )
