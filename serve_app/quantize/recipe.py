"""Recipe: how a model is quantized; the plan that it makes for each matrix; the bytes that follow.

A matrix [N, K] in groups of g columns takes, in the packing of GPTQ (version 1)::

    qweight  N · K · bits / 8           codes, 32 / bits of them in an int32
    scales   N · K / g · 2              float16
    qzeros   N · K / g · bits / 8       zero points, less one, packed as the codes are
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, get_args

from serve_app.core.errors import ConfigError

Algorithm = Literal["rtn", "gptq", "autoround", "awq"]
ALGORITHMS: tuple[Algorithm, ...] = get_args(Algorithm)
BITS = (4, 8)
GROUP_SIZES = (32, 64, 128)
_LAYER_NUMBER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Recipe:
    """What `xeray quantize` does to a model.

    Weights:
        algorithm: rtn rounds to the nearest; gptq corrects each column's error in the columns after
            it; awq scales columns by their activations; autoround trains the rounding.
        bits, group_size, is_symmetric: of each quantized matrix. Symmetric is what XPU's kernels
            take.
        skip: patterns of matrices that stay as they are. wide: patterns of those that get 8 bits. A
            pattern is searched for in a matrix's name; `first:N` and `last:N` before a colon limit
            it to the first or last N layers (`last:2:down_proj`).
    Calibration:
        num_samples × sample_tokens tokens; iterations: autoround's steps per block, each on
        batch_size samples. act_order: gptq takes the columns of the largest activations first.
    """

    algorithm: Algorithm = "autoround"
    bits: int = 4
    group_size: int = 32
    is_symmetric: bool = True
    skip: tuple[str, ...] = ("lm_head",)
    wide: tuple[str, ...] = ()
    num_samples: int = 128
    sample_tokens: int = 256
    iterations: int = 200
    batch_size: int = 8
    act_order: bool = False
    seed: int = 42

    def __post_init__(self) -> None:
        for name, values in (
            ("algorithm", ALGORITHMS),
            ("bits", BITS),
            ("group_size", GROUP_SIZES),
        ):
            value = getattr(self, name)
            if value not in values:
                raise _invalid(name, f"{value} is not among {', '.join(map(str, values))}")
        for name in ("num_samples", "sample_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise _invalid(name, "less than 1")
        if self.iterations < 0:
            raise _invalid("iterations", "less than 0")
        for name in ("skip", "wide"):
            for pattern in getattr(self, name):
                _check_pattern(name, pattern)
        if self.act_order and self.algorithm != "gptq":
            raise _invalid("act_order", "only gptq orders columns; take --algorithm gptq")

    @property
    def needs_calibration(self) -> bool:
        """Whether the algorithm looks at activations."""
        return self.algorithm != "rtn"

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, and back with `from_dict`."""
        values = asdict(self)
        return {**values, "skip": list(self.skip), "wide": list(self.wide)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """Rebuild what `to_dict` returned; unknown keys are left out."""
        known = {each.name for each in fields(cls)} & set(values)
        given = {name: values[name] for name in known}
        for name in {"skip", "wide"} & known:
            given[name] = tuple(given[name])
        return cls(**given)


@dataclass(frozen=True, slots=True)
class MatrixPlan:
    """How one matrix [rows, columns] is stored; `bits` is None where it stays dense."""

    name: str
    rows: int
    columns: int
    bits: int | None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """Every linear matrix of a model with its bits; names are modules', without `.weight`."""

    recipe: Recipe
    matrices: tuple[MatrixPlan, ...]
    _by_name: dict[str, MatrixPlan] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self._by_name.update({matrix.name: matrix for matrix in self.matrices})

    def bits_of(self, name: str) -> int | None:
        """Bits of module `name`; None where it stays dense or is no linear matrix."""
        matrix = self._by_name.get(name)
        return matrix.bits if matrix else None

    @property
    def quantized(self) -> tuple[MatrixPlan, ...]:
        """Those that get fewer bits."""
        return tuple(matrix for matrix in self.matrices if matrix.bits is not None)

    @property
    def dense(self) -> tuple[MatrixPlan, ...]:
        """Those that stay as they are."""
        return tuple(matrix for matrix in self.matrices if matrix.bits is None)


def make_plan(shapes: Mapping[str, tuple[int, ...]], recipe: Recipe) -> Plan:
    """Plan for modules of `shapes` (name → (rows, columns)).

    Raises ConfigError where nothing is left to quantize or a pattern meets no matrix: a misspelt
    pattern would otherwise quantize what should have been spared.
    """
    num_layers = 1 + max((_layer(name) or 0 for name in shapes), default=0)
    for option in ("skip", "wide"):
        for pattern in getattr(recipe, option):
            if pattern != "lm_head" and not any(matches(pattern, n, num_layers) for n in shapes):
                raise _invalid(option, f"{pattern!r} meets no matrix of this model")
    matrices = []
    for name, (rows, columns) in shapes.items():
        bits, reason = _bits(name, columns, recipe, num_layers)
        matrices.append(MatrixPlan(name, rows, columns, bits, reason))
    plan = Plan(recipe, tuple(matrices))
    if not plan.quantized:
        raise ConfigError(
            "model: no matrix is left to quantize; skip fewer, or take a smaller --group-size",
            param="model",
        )
    return plan


def _bits(name: str, columns: int, recipe: Recipe, num_layers: int) -> tuple[int | None, str]:
    if any(matches(pattern, name, num_layers) for pattern in recipe.skip):
        return None, "skipped"
    if columns % recipe.group_size:
        return None, f"{columns} columns are no multiple of {recipe.group_size}"
    if any(matches(pattern, name, num_layers) for pattern in recipe.wide):
        return 8, "wide"
    return recipe.bits, ""


def matches(pattern: str, name: str, num_layers: int) -> bool:
    """Whether `pattern` (see `Recipe`) meets the module `name` of a model of `num_layers`."""
    where, count, rest = _split(pattern)
    layer = _layer(name)
    if where == "first" and (layer is None or layer >= count):
        return False
    if where == "last" and (layer is None or layer < num_layers - count):
        return False
    return re.search(rest, name) is not None


def _split(pattern: str) -> tuple[str, int, str]:
    match = re.fullmatch(r"(first|last):(\d+)(?::(.*))?", pattern)
    if match is None:
        return "", 0, pattern
    return match.group(1), int(match.group(2)), match.group(3) or ""


def _check_pattern(option: str, pattern: str) -> None:
    try:
        re.compile(_split(pattern)[2])
    except re.error as error:
        raise _invalid(option, f"{pattern!r} is no pattern: {error}") from None


def _layer(name: str) -> int | None:
    match = _LAYER_NUMBER.search(f".{name}.")
    return int(match.group(1)) if match else None


def packed_bytes(rows: int, columns: int, bits: int, group_size: int) -> int:
    """Bytes of one quantized matrix in the folder; see the module's table."""
    groups = columns // group_size
    return rows * columns * bits // 8 + rows * groups * 2 + rows * groups * bits // 8


def planned_bytes(plan: Plan, shapes: Iterable[tuple[str, tuple[int, ...]]], itemsize: int) -> int:
    """Bytes of all weights of the folder that `plan` makes of tensors `shapes` (with `.weight`)."""
    total = 0
    for name, shape in shapes:
        bits = plan.bits_of(name.removesuffix(".weight"))
        if bits is not None and name.endswith(".weight"):
            total += packed_bytes(shape[0], shape[1], bits, plan.recipe.group_size)
            continue
        count = 1
        for size in shape:
            count *= size
        total += count * itemsize
    return total


def merged(base: Recipe, **changes: Any) -> Recipe:
    """`base` with those `changes` that are not None."""
    return replace(base, **{name: value for name, value in changes.items() if value is not None})


def _invalid(name: str, reason: str) -> ConfigError:
    return ConfigError(f"--{name.replace('_', '-')}: {reason}", param=name)


PRESETS: dict[str, Recipe] = {
    "compact": Recipe(),
    "balanced": Recipe(
        wide=("last:3", "down_proj", "v_proj"), num_samples=48, iterations=30, batch_size=4
    ),
    "quick": Recipe(algorithm="rtn"),
}
"""Recipes by name; README of this folder has what each was measured to cost."""
