"""Proof that an output folder is whole, before success is said.

A loader's warning is not enough: transformers fills what it misses with noise and goes on. So the
tensors are compared by name and shape with the source's, then XeRay's own loader reads the folder,
or transformers where XeRay has no such network, and one pass must give finite logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from serve_app.core.errors import ConfigError
from serve_app.models.config import UnsupportedArchitectureError
from serve_app.quantize.folder import tensor_shapes
from serve_app.quantize.recipe import Plan
from serve_app.quantize.scoring import open_scorer

Shapes = Mapping[str, tuple[tuple[int, ...], str]]
_PROBE_TOKENS = 16
_INTEGER = "I32"


@dataclass(frozen=True, slots=True)
class Verdict:
    """`engine` is which loader ran the probe: native or transformers."""

    engine: str
    num_tensors: int
    num_quantized: int


def verify_folder(folder: Path, source: Path, plan: Plan, *, is_tied: bool) -> Verdict:
    """Check a finished folder. Raises ConfigError that names the first fault."""
    written, original = tensor_shapes(folder), tensor_shapes(source)
    if faults := tensor_faults(written, original, plan, is_tied=is_tied):
        more = f" and {len(faults) - 1} more" if len(faults) > 1 else ""
        raise _failed(folder, faults[0] + more)
    try:
        scorer = open_scorer(folder, "native", device="cpu", dtype="auto")
        engine = "native"
    except UnsupportedArchitectureError:
        scorer = open_scorer(folder, "transformers", device="cpu", dtype="auto")
        engine = "transformers"
    generator = torch.Generator().manual_seed(0)
    probe = torch.randint(scorer.vocab_size, (_PROBE_TOKENS,), generator=generator)
    if not bool(torch.isfinite(scorer.logits(probe)).all()):
        raise _failed(folder, f"its logits are not finite ({engine} engine)")
    return Verdict(engine, len(written), len(plan.quantized))


def tensor_faults(written: Shapes, original: Shapes, plan: Plan, *, is_tied: bool) -> list[str]:
    """Say what is missing, too much, or of another shape, one entry each."""
    group, faults, expected = plan.recipe.group_size, [], set()
    for name, (shape, _) in original.items():
        module = name.removesuffix(".weight")
        if is_tied and name == "lm_head.weight":
            continue
        bits = plan.bits_of(module) if name.endswith(".weight") else None
        if bits is None:
            wanted = {name: shape}
        else:
            rows, columns = shape
            wanted = {
                f"{module}.qweight": (columns * bits // 32, rows),
                f"{module}.scales": (columns // group, rows),
                f"{module}.qzeros": (columns // group, -(-rows * bits // 32)),
            }
        for part, part_shape in wanted.items():
            expected.add(part)
            faults += _fault(part, part_shape, written)
    faults += [f"{name} is of no layer of the source" for name in sorted(set(written) - expected)]
    return faults


def _fault(name: str, shape: tuple[int, ...], written: Shapes) -> list[str]:
    if name not in written:
        return [f"{name} is missing"]
    found, dtype = written[name]
    if found != shape:
        return [f"{name} is {list(found)}, not {list(shape)}"]
    is_packed = name.endswith((".qweight", ".qzeros"))
    if is_packed != (dtype == _INTEGER):
        return [f"{name} is stored as {dtype}"]
    return []


def _failed(folder: Path, reason: str) -> ConfigError:
    return ConfigError(f"--output: {folder.name} did not pass its check: {reason}", param="output")
