"""The compiled operators beside their ATen twins, and the ways in which they stand back."""

from __future__ import annotations

import logging
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from serve_app.models.kernels import cpu as cpu_module
from serve_app.models.kernels.cpu import CpuKernels, cpu_kernels
from serve_app.models.layers import apply_rotary

HEADS, KV_HEADS, BLOCK_SIZE = 6, 2, 16
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture
def kernels(dtype: torch.dtype) -> CpuKernels:
    found = cpu_kernels(torch.empty(0, dtype=dtype))
    if found is None:
        pytest.skip("no g++ here, or another OpenMP than GCC's")
    return found


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    return {"rtol": 2e-5, "atol": 2e-5} if dtype is torch.float32 else {"rtol": 1e-2, "atol": 1e-2}


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_rms_norm_is_the_twins(kernels: CpuKernels, dtype: torch.dtype) -> None:
    x, residual = torch.randn(5, 96).to(dtype), torch.randn(5, 96)
    weight = torch.rand(96)
    for before in (None, residual):
        expected = x.float() if before is None else before + x
        out, summed = kernels.add_rms_norm(x, before, weight, 1e-5)
        assert torch.equal(summed, expected)
        norm = F.rms_norm(expected, (96,), weight, 1e-5)
        torch.testing.assert_close(out.float(), norm, **tolerance(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_and_mul_is_the_twins_also_at_the_ends(
    kernels: CpuKernels, dtype: torch.dtype
) -> None:
    gate = torch.cat((torch.linspace(-200, 200, 62), torch.tensor([0.0, torch.nan]))).to(dtype)
    up = torch.randn(64).to(dtype)
    out = kernels.silu_and_mul(torch.cat((gate, up))[None])[0]
    expected = F.silu(gate.float()) * up.float()
    torch.testing.assert_close(out.float(), expected, equal_nan=True, **tolerance(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_norms", [False, True])
def test_rotate_and_cache_is_the_twins(
    kernels: CpuKernels, dtype: torch.dtype, has_norms: bool
) -> None:
    dim, num_rows = 64, 3
    qkv = torch.randn(num_rows, (HEADS + 2 * KV_HEADS) * dim).to(dtype)
    angles = torch.randn(num_rows, dim // 2)
    cos = torch.cat((angles.cos(), angles.cos()), -1).to(dtype)
    sin = torch.cat((-angles.sin(), angles.sin()), -1).to(dtype)
    weights = (torch.rand(dim), torch.rand(dim)) if has_norms else (None, None)
    slots = torch.tensor([17, 40, 3])
    heads = qkv.float().view(num_rows, -1, dim)
    rotated, values = heads[:, : HEADS + KV_HEADS].clone(), heads[:, HEADS + KV_HEADS :]
    if has_norms:
        rotated[:, :HEADS] = F.rms_norm(rotated[:, :HEADS], (dim,), weights[0], 1e-6)
        rotated[:, HEADS:] = F.rms_norm(rotated[:, HEADS:], (dim,), weights[1], 1e-6)
    apply_rotary(rotated, cos.float()[:, None], sin.float()[:, None])
    cache = torch.zeros(2, 4, BLOCK_SIZE, KV_HEADS, dim, dtype=dtype)
    query = kernels.rotate_and_cache(
        qkv.clone(),
        cos,
        sin,
        slots,
        cache,
        HEADS,
        query_weight=weights[0],
        key_weight=weights[1],
        eps=1e-6,
    )
    torch.testing.assert_close(query.float(), rotated[:, :HEADS], **tolerance(dtype))
    rows = cache.view(2, -1, KV_HEADS, dim)
    torch.testing.assert_close(rows[0, slots].float(), rotated[:, HEADS:], **tolerance(dtype))
    assert torch.equal(rows[1, slots].float(), values)
    assert rows.float().abs().sum(dim=(0, 2, 3)).count_nonzero() == num_rows


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [32, 64, 96, 128])
def test_decode_attention_is_the_twins_at_any_length(
    kernels: CpuKernels, dtype: torch.dtype, dim: int
) -> None:
    lens = [1, 15, 16, 256, 257, 600]
    query, cache, tables = pages(dtype, dim, len(lens))
    out = kernels.decode_attention(query, cache, tables, torch.tensor(lens), max(lens))
    for row, length in enumerate(lens):
        keys, values = (plane[tables[row]].flatten(0, 1)[:length].float() for plane in cache)
        expected = F.scaled_dot_product_attention(
            query[row, :, None].float(),
            keys.transpose(0, 1),
            values.transpose(0, 1),
            enable_gqa=True,
        )
        torch.testing.assert_close(out[row].float(), expected[:, 0], **tolerance(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_rows_bits_depend_on_nothing_else(kernels: CpuKernels, dtype: torch.dtype) -> None:
    lens = torch.tensor([40, 300, 7, 600, 256])
    query, cache, tables = pages(dtype, 64, len(lens))
    x = torch.randn(400, 128).to(dtype)
    together = kernels.decode_attention(query, cache, tables, lens, 600)
    weight = torch.rand(128)
    silu, norm = kernels.silu_and_mul(x), kernels.add_rms_norm(x, None, weight, 1e-5)[0]
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for row, length in enumerate(lens.tolist()):
            rows = slice(row, row + 1)
            alone = kernels.decode_attention(query[rows], cache, tables[rows], lens[rows], length)
            assert torch.equal(alone[0], together[row])
            assert torch.equal(kernels.silu_and_mul(x[rows])[0], silu[row])
            assert torch.equal(kernels.add_rms_norm(x[rows], None, weight, 1e-5)[0][0], norm[row])
    finally:
        torch.set_num_threads(before)


def pages(
    dtype: torch.dtype, dim: int, num_rows: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries that lie apart, as in packed qkv, a cache, and tables of scattered blocks."""
    query = torch.randn(num_rows, HEADS + 2, dim).to(dtype)[:, :HEADS]
    cache = torch.randn(2, 120, BLOCK_SIZE, KV_HEADS, dim).to(dtype)
    return query, cache, torch.randint(1, 120, (num_rows, 40))


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The library as a new process finds it, with a cache of its own that holds nothing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(cpu_module, "_library", cpu_module._library.__wrapped__)
    return tmp_path


def test_without_a_compiler_there_are_none(unloaded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(unloaded))
    assert cpu_module._library() is None


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize("cache", ["/proc/none", "file"])
def test_where_nothing_can_be_kept_each_process_compiles(
    unloaded: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, cache: str
) -> None:
    (unloaded / "file").touch()
    (unloaded / "tmp").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(unloaded / cache))
    monkeypatch.setattr(tempfile, "tempdir", str(unloaded / "tmp"))
    with caplog.at_level(logging.WARNING):
        library = cpu_module._library()
    assert library is not None
    assert library.silu_and_mul_float32 is not None
    assert not caplog.records
    assert not list((unloaded / "tmp").iterdir())


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_a_source_that_does_not_compile_is_told_in_one_line(
    unloaded: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken = unloaded / "cpu.cpp"
    broken.write_text("no C++")
    monkeypatch.setattr(cpu_module, "_SOURCE", broken)
    with caplog.at_level(logging.WARNING):
        assert cpu_module._library() is None
    (record,) = caplog.records
    assert "cannot be compiled" in record.getMessage()
    assert "\n" not in record.getMessage()
    assert not list((unloaded / "cache").rglob("cpu-*")), "nothing half made is kept"
