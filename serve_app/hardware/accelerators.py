"""What torch sees: one record per accelerator. Torch is imported inside the functions only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

ACCELERATOR_KINDS = ("xpu", "cuda")


@dataclass(frozen=True, slots=True)
class Accelerator:
    """One device: `kind` is torch's device type, memory in bytes (`free_bytes` None: not told)."""

    kind: str
    index: int
    name: str
    memory_bytes: int
    free_bytes: int | None = None


def list_accelerators(torch_module: Any = None) -> tuple[Accelerator, ...]:
    """Return the accelerators that torch can use now, Arc cards first.

    `torch_module` stands in for torch in tests of hardware that is not here.
    """
    torch = torch_module or _import_torch()
    found: list[Accelerator] = []
    for kind in ACCELERATOR_KINDS:
        module = getattr(torch, kind, None)
        if module is not None and module.is_available():
            found.extend(_describe(module, kind, index) for index in range(module.device_count()))
    return tuple(found)


def best_device(torch_module: Any = None) -> str:
    """Return the torch device type that `engine.device: auto` means: xpu, cuda, else cpu."""
    accelerators = list_accelerators(torch_module)
    return accelerators[0].kind if accelerators else "cpu"


def _describe(module: Any, kind: str, index: int) -> Accelerator:
    properties = module.get_device_properties(index)
    return Accelerator(
        kind=kind,
        index=index,
        name=str(properties.name),
        memory_bytes=int(properties.total_memory),
        free_bytes=_free_bytes(module, index),
    )


def _free_bytes(module: Any, index: int) -> int | None:
    # Some drivers cannot tell (integrated GPUs, older Level Zero): the total then stands alone.
    try:
        return int(module.mem_get_info(index)[0])
    except (AttributeError, RuntimeError):
        return None


def _import_torch() -> Any:
    import torch

    return torch
