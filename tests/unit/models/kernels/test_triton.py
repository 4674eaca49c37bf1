"""The switch and the guard."""

import subprocess
import sys

import pytest
import torch

from serve_app.core.errors import ConfigError
from serve_app.models.kernels import _triton


@pytest.fixture
def environment(monkeypatch):
    def set_variable(value: str) -> None:
        monkeypatch.setenv(_triton.DISABLE_VARIABLE, value)
        _triton.disabled_kernels.cache_clear()

    yield set_variable
    _triton.disabled_kernels.cache_clear()


def test_names_switch_off_what_they_name(environment):
    environment("norm, rope")
    assert _triton.disabled_kernels() == {"norm", "rope"}


def test_all_switches_off_each_kernel(environment):
    environment("all")
    assert _triton.disabled_kernels() == set(_triton.KERNEL_NAMES)
    assert not _triton.has_kernel("norm", torch.zeros(1))


def test_unknown_name_is_refused(environment):
    environment("norm,flash")
    with pytest.raises(ConfigError, match="XERAY_DISABLE_KERNELS names flash"):
        _triton.disabled_kernels()


def test_switched_off_kernel_leaves_the_others(environment, kernel_device):
    environment("norm")
    tensor = torch.zeros(1, device=kernel_device)
    assert not _triton.has_kernel("norm", tensor)
    assert _triton.has_kernel("rope", tensor)


def test_twins_run_without_triton():
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from serve_app.models.kernels import _triton, activation, gemv, int4_gemv, norm\n"
        "from serve_app.models.kernels import paged_decode, rope\n"
        "assert not _triton.HAS_TRITON\n"
        "print(activation.silu_and_mul(torch.ones(1, 4)).shape[1])\n"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "2"), done.stderr
