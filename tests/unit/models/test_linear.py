from __future__ import annotations

import pytest
import torch

from serve_app.models import linear
from serve_app.models.kernels.cpu_packed import packed_cpu_kernel
from serve_app.models.linear import LinearPolicy, make_head, make_linear, make_packed_head
from serve_app.models.matmul import Int4CpuKernel
from serve_app.models.quantized import quantize

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    packed_cpu_kernel(quantize(torch.ones(16, 32), 4))  # compiled, if so, in the usual place
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.fixture
def aten(monkeypatch):
    """Kernels as on a machine without g++."""
    monkeypatch.setattr("serve_app.models.kernels.cpu_packed._library", lambda: None)


@pytest.fixture(params=[False, True], ids=["compiled", "aten"])
def each_kernel(request):
    if request.param:
        request.getfixturevalue("aten")


def policy(**changes):
    values = {"device": CPU, "dtype": torch.bfloat16, "dense_dtype": torch.bfloat16}
    return LinearPolicy(**(values | changes))


def weights(count=3, num_columns=64):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(32, num_columns, generator=generator) for _ in range(count)]


def test_parts_are_stacked_in_order_with_their_biases():
    parts = weights()
    biases = [torch.randn(32), None, torch.randn(32)]
    layer = make_linear(parts, biases, policy(dtype=torch.float32, dense_dtype=torch.float32))
    x = torch.randn(5, 64)
    expected = [x @ part.T + (0 if b is None else b) for part, b in zip(parts, biases, strict=True)]
    torch.testing.assert_close(layer(x), torch.cat(expected, dim=1))
    assert layer.weight_format == "dense"


@pytest.mark.usefixtures("each_kernel")
@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_any_number_of_rows_gives_the_same_product(bits, batch_invariant):
    parts = [quantize(part, bits) for part in weights()]
    layer = make_linear(parts, [None] * 3, policy(batch_invariant=batch_invariant))
    dense = torch.cat([part.dequantize(torch.float32) for part in parts])
    for num_rows in (1, 3, 8, 33, 100):
        x = torch.randn(num_rows, 64, dtype=torch.bfloat16)
        expected = x.float() @ dense.T
        for is_invariant in (False, True):
            y = layer(x, is_invariant).float()
            assert (y - expected).norm() / expected.norm() < 6e-3
    assert layer.weight_format == f"int{bits}"


@pytest.mark.usefixtures("aten")
def test_without_memory_for_a_dense_copy_the_packed_kernel_does_all():
    parts = [quantize(part, 4) for part in weights()]
    slim = make_linear(parts, [None] * 3, policy(keeps_dense=False))
    full = make_linear(parts, [None] * 3, policy())
    assert slim.nbytes < 0.4 * full.nbytes
    x = torch.randn(64, 64, dtype=torch.bfloat16)
    torch.testing.assert_close(slim(x), full(x), rtol=0.05, atol=0.2)


def test_batch_invariant_layers_measure_nothing(monkeypatch):
    def fail(*_):
        raise AssertionError("a measured choice can differ between replicas")

    monkeypatch.setattr(linear, "_measure_threshold", fail)
    make_linear([quantize(weights(1)[0], 4)], [None], policy(batch_invariant=True))


@pytest.mark.usefixtures("aten")
def test_a_shape_is_measured_once(monkeypatch):
    monkeypatch.setattr(linear, "_thresholds", {})
    monkeypatch.setattr(linear, "_spent_s", {})
    calls = []
    measure = linear._seconds
    monkeypatch.setattr(linear, "_seconds", lambda *args: calls.append(args) or measure(*args))
    parts = [quantize(weights(1)[0], 4)]
    make_linear(parts, [None], policy())
    count = len(calls)
    make_linear(parts, [None], policy())
    assert count == len(calls) > 0
    monkeypatch.setattr(linear, "_thresholds", {})  # as in the next process
    make_linear(parts, [None], policy())
    assert len(calls) == count


@pytest.mark.usefixtures("aten")
@pytest.mark.parametrize(("packed_wins_to", "expected"), [(0, 0), (4, 4), (64, 64)])
def test_the_threshold_is_where_dense_begins_to_win(monkeypatch, packed_wins_to, expected):
    monkeypatch.setattr(linear, "_thresholds", {})
    monkeypatch.setattr(linear, "_spent_s", {})

    def seconds(kernel, x):
        is_dense = not isinstance(kernel, Int4CpuKernel)
        return packed_wins_to + 0.5 if is_dense else float(x.shape[0])

    monkeypatch.setattr(linear, "_seconds", seconds)
    layer = make_linear([quantize(weights(1)[0], 4)], [None], policy())
    assert layer._threshold == expected


def test_a_tied_head_shares_the_embedding():
    dense = torch.randn(96, 64, dtype=torch.bfloat16)
    head = make_head(dense, dense, policy())
    assert head.nbytes == dense.nbytes
    x = torch.randn(2, 64, dtype=torch.bfloat16)
    torch.testing.assert_close(head(x), x @ dense.T)


@pytest.mark.usefixtures("aten")
def test_measuring_ends_when_the_machine_is_too_busy(monkeypatch):
    monkeypatch.setattr(linear, "_thresholds", {})
    monkeypatch.setattr(linear, "_spent_s", {"measuring": 5.0})
    monkeypatch.setattr(linear, "_seconds", None)
    layer = make_linear([quantize(weights(1)[0], 4)], [None], policy())
    assert layer._threshold == 8


def test_no_dense_copy_lies_beside_the_packed_weight():
    weight = quantize(weights(1)[0], 4)
    kernel = packed_cpu_kernel(weight)
    if kernel is None:
        pytest.skip("no g++")
    layer = make_linear([weight], [None], policy())
    assert layer.nbytes == kernel.nbytes < 0.4 * 2 * 32 * 64 + 1
    wide = {"dtype": torch.float32, "dense_dtype": torch.float32}
    assert make_linear([weight], [None], policy(**wide)).nbytes == kernel.nbytes


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_a_packed_head_yields_exact_logits(batch_invariant):
    weight = quantize(torch.randn(96, 64), 8)
    head = make_packed_head(weight, policy(batch_invariant=batch_invariant))
    if head is None:
        pytest.skip("no g++")
    x = torch.randn(40, 64, dtype=torch.bfloat16)
    logits = head(x, batch_invariant)
    torch.testing.assert_close(logits, x.float() @ weight.dequantize(torch.float32).T)
    assert torch.equal(head(x[7:8], batch_invariant), logits[7:8])


@pytest.mark.usefixtures("aten")
def test_without_the_kernel_the_head_is_dense():
    assert make_packed_head(quantize(torch.randn(96, 64), 8), policy()) is None
