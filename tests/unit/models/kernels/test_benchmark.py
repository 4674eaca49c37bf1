import pytest
import torch

from serve_app.models.kernels import benchmark
from serve_app.models.kernels._triton import IS_INTERPRETED, KERNEL_NAMES

ON_OTHER_TERMS = {
    *("paged_decode", "sampling", "overlap", "experts"),
    *("cpu", "cpu_packed", "cpu_prefill", "cpu_step"),
}
"""Switches without a case, and kernels whose last bits may differ from the twin's."""


@pytest.fixture
def small_shapes(monkeypatch):
    shapes = {"HIDDEN": 128, "NUM_HEADS": 2, "NUM_KV_HEADS": 1, "HEAD_DIM": 32, "INTERMEDIATE": 128}
    for name, size in shapes.items():
        monkeypatch.setattr(benchmark, name, size)
    matrices = {"qkv": (128, 128), "down": (64, 256), "head": (96, 128)}
    monkeypatch.setattr(benchmark, "MATRICES", matrices)
    monkeypatch.setattr(benchmark, "BATCHES", (1, 5))
    monkeypatch.setattr(benchmark, "_ROTATED_BYTES", 1)
    monkeypatch.setattr(benchmark, "_MAX_SETS", 2)


@pytest.mark.skipif(IS_INTERPRETED, reason="the benchmark's bfloat16 is for cards")
@pytest.mark.parametrize("kernel", sorted(set(KERNEL_NAMES) - ON_OTHER_TERMS))
def test_each_case_and_its_twin_do_the_same(small_shapes, kernel):
    cases = list(benchmark.all_cases(torch.device("cpu"), {kernel}))
    assert cases
    for case in cases:
        assert case.kernel == kernel
        assert case.num_bytes > 0
        result, expected = case.runs[0](), case.twins[0]()
        assert torch.equal(result, expected), case.label


def test_decode_case_counts_keys_and_values(small_shapes):
    case = benchmark._decode_case(torch.device("cpu"), 2, 32, 64, False, "two")
    assert case.num_bytes == 2 * 2 * 32 * 1 * 32 * 2
    assert case.twins[0]().shape == (2, 2, 32)


def test_without_a_card_there_is_nothing_to_time(monkeypatch, capsys):
    monkeypatch.setattr(benchmark.torch.accelerator, "current_accelerator", lambda **_: None)
    monkeypatch.setattr(benchmark.sys, "argv", ["benchmark"])
    assert benchmark.main() == 0
    assert "nothing to time" in capsys.readouterr().out


def test_unknown_kernel_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(benchmark.sys, "argv", ["benchmark", "--kernels", "norm,flash"])
    with pytest.raises(SystemExit):
        benchmark.main()
    assert "names flash" in capsys.readouterr().err
