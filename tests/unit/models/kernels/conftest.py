"""Where the kernels run here: on a card, in Triton's interpreter, or not at all.

`TRITON_INTERPRET=1 pytest tests/unit/models/kernels` checks the kernels' arithmetic on a CPU.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from serve_app.models.kernels import _triton

TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}


def _card() -> str | None:
    if torch.cuda.is_available():
        return "cuda"
    return "xpu" if torch.xpu.is_available() else None


@pytest.fixture(params=["float32", "float16", "bfloat16"])
def dtype(request) -> torch.dtype:
    """Each dtype that the kernels take; the interpreter's bfloat16 is its own, so not that one."""
    if request.param == "bfloat16" and _triton.IS_INTERPRETED:
        pytest.skip("Triton's interpreter: bfloat16 is checked on a card")
    return getattr(torch, request.param)


@pytest.fixture(autouse=True, scope="session")
def _interpreter_takes_loop_bounds() -> Iterator[None]:
    """Let interpreted scalars be loop bounds: numpy 2.4 refuses int() of one-element arrays."""
    if not _triton.IS_INTERPRETED:
        yield
        return
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patched(tensor: type, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patched
    yield
    interpreter._patch_lang_tensor = patch_tensor


@pytest.fixture
def kernel_device() -> torch.device:
    """The device on which kernels run; skips where none does."""
    if not _triton.HAS_TRITON:
        pytest.skip("Triton is not installed: the twins run, and have tests of their own")
    if _triton.IS_INTERPRETED:
        return torch.device("cpu")
    card = _card()
    if card is None:
        pytest.skip("no CUDA or XPU card; TRITON_INTERPRET=1 checks the kernels on the CPU")
    return torch.device(card)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def assert_near() -> Callable[..., None]:
    """A function (actual, expected, tolerance): ‖actual − expected‖ ≤ tolerance · ‖expected‖."""

    def check(actual: torch.Tensor, expected: torch.Tensor, tolerance: float | None = None) -> None:
        assert actual.shape == expected.shape
        limit = TOLERANCE[actual.dtype] if tolerance is None else tolerance
        wide, reference = actual.double().cpu(), expected.double().cpu()
        assert torch.isfinite(wide).all()
        error = (wide - reference).norm() / reference.norm().clamp_min(1e-30)
        assert error <= limit, f"relative difference {error:.2e} > {limit:.2e}"

    return check
