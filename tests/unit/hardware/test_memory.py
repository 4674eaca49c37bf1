from __future__ import annotations

from pathlib import Path

import pytest

from serve_app.hardware.memory import (
    ModelShape,
    activation_bytes,
    available_memory_bytes,
    dense_copy_bytes,
    kv_bytes_per_token,
    total_memory_bytes,
    weights_bytes,
)

QWEN_7B = ModelShape("qwen-7b", 28, 3584, 18944, 28, 4, 128, 152064, 131072)
TINY = ModelShape("tiny", 2, 64, 128, 4, 2, 16, 1000, 512, is_tied=True)


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_the_count_of_weights_is_that_of_the_published_model() -> None:
    assert QWEN_7B.num_params == pytest.approx(7.616e9, rel=0.001)


def test_dense_weights_are_the_count_times_the_type() -> None:
    assert weights_bytes(QWEN_7B, "dense", "bfloat16") == 2 * QWEN_7B.num_params
    assert weights_bytes(QWEN_7B, "dense", "float32") == 4 * QWEN_7B.num_params


def test_quantized_weights_keep_the_embedding_dense() -> None:
    # Per layer: q and o 64×64 each, k and v 64×32 each, three matrices of the MLP 64×128.
    linear = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    embedding = 1000 * 64

    assert TINY.num_linear_params == linear
    expected_bits = embedding * 16 + (linear + embedding) * 5
    assert weights_bytes(TINY, "int4", "bfloat16") == expected_bits // 8


def test_formats_are_ordered() -> None:
    sizes = [weights_bytes(QWEN_7B, name, "bfloat16") for name in ("dense", "int8", "int4")]

    assert sizes == sorted(sizes, reverse=True)


def test_experts_are_all_held() -> None:
    dense = ModelShape("m", 1, 64, 128, 4, 4, 16, 100, 512)
    moe = ModelShape("m", 1, 64, 128, 4, 4, 16, 100, 512, num_experts=8)

    assert moe.num_linear_params - dense.num_linear_params == 7 * 3 * 64 * 128


def test_kv_bytes_of_a_token() -> None:
    assert kv_bytes_per_token(QWEN_7B, "bfloat16") == 2 * 28 * 4 * 128 * 2
    assert kv_bytes_per_token(TINY, "float32") == 2 * 2 * 2 * 16 * 4


def test_activations_grow_with_rows_and_sequences() -> None:
    def size(tokens: int, seqs: int) -> int:
        return activation_bytes(TINY, num_batched_tokens=tokens, num_seqs=seqs, dtype="float32")

    assert size(200, 1) - size(100, 1) == 100 * (2 * 64 + 3 * 128) * 4
    assert size(1, 9) - size(1, 8) == 3 * 1000 * 4


def test_memory_without_a_cgroup(tmp_path: Path) -> None:
    write(tmp_path, {"proc/meminfo": "MemTotal: 4194304 kB\nMemAvailable: 1048576 kB\n"})

    assert total_memory_bytes(tmp_path) == 4 << 30
    assert available_memory_bytes(tmp_path) == 1 << 30


def test_memory_is_held_to_the_cgroup(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "proc/meminfo": "MemTotal: 67108864 kB\nMemAvailable: 33554432 kB\n",
            "proc/self/cgroup": "0::/box\n",
            "sys/fs/cgroup/box/memory.max": str(2 << 30),
            "sys/fs/cgroup/box/memory.current": str(1 << 29),
        },
    )

    assert total_memory_bytes(tmp_path) == 2 << 30
    assert available_memory_bytes(tmp_path) == 3 << 29


def test_a_cgroup_over_its_limit_has_nothing_left(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "proc/meminfo": "MemTotal: 67108864 kB\nMemAvailable: 33554432 kB\n",
            "proc/self/cgroup": "0::/box\n",
            "sys/fs/cgroup/box/memory.max": "1000",
            "sys/fs/cgroup/box/memory.current": "2000",
        },
    )

    assert available_memory_bytes(tmp_path) == 0


def test_this_machine_has_memory() -> None:
    assert 0 < available_memory_bytes() <= total_memory_bytes()


def test_a_dense_copy_is_kept_where_it_is_small() -> None:
    copy_bytes = TINY.num_linear_params * 2

    assert dense_copy_bytes(TINY, "int4", "bfloat16", 3 * copy_bytes) == copy_bytes
    assert dense_copy_bytes(TINY, "int4", "bfloat16", 2 * copy_bytes) == 0
    assert dense_copy_bytes(TINY, "dense", "bfloat16", 3 * copy_bytes) == 0
