from __future__ import annotations

import pytest

from serve_app.core.errors import ConfigError
from serve_app.engine import sizing
from serve_app.engine.devices import physical_cpu_ids
from serve_app.engine.model_runner import batch_buckets, context_buckets


def choose(**changes: object) -> int:
    settings: dict[str, object] = {
        "kv_cache_tokens": None,
        "memory_fraction": 0.5,
        "free_bytes": 1 << 20,
        "bytes_per_token": 64,
        "block_size": 16,
        "max_num_seqs": 1000,
        "max_model_len": 1000,
    }
    return sizing.choose_num_blocks(**{**settings, **changes})


def test_kv_cache_takes_its_share_and_the_scratch_block_counts():
    assert choose() == (1 << 19) // (16 * 64) - 1


def test_kv_cache_is_no_larger_than_useful():
    assert choose(max_num_seqs=2, max_model_len=100) == 14


def test_kv_cache_tokens_are_taken_at_their_word_if_they_fit():
    assert choose(kv_cache_tokens=100) == 7
    with pytest.raises(ConfigError, match="kv_cache_tokens"):
        choose(kv_cache_tokens=1 << 20)


def test_no_room_is_one_line_with_the_arithmetic():
    with pytest.raises(ConfigError, match="kv_cache_memory_fraction"):
        choose(free_bytes=1000)


@pytest.mark.parametrize(
    ("token_s", "decode_s", "expected"),
    [(0.0, 0.0, 1024), (0.001, 0.0, 128), (0.001, 0.2, 32), (1.0, 0.0, 16)],
)
def test_the_budget_fits_beside_a_decode_step(monkeypatch, token_s, decode_s, expected):
    now = [0.0]
    monkeypatch.setattr(sizing.time, "perf_counter", lambda: now[0])

    def run(num_tokens: int) -> None:
        now[0] += num_tokens * token_s

    budget = sizing.measure_budget(run, largest=1024, decode_step_s=decode_s)
    assert budget == expected


def test_buckets_reach_the_limits():
    assert batch_buckets(32) == [1, 2, 4, 8, 16, 24, 32]
    assert batch_buckets(3) == [1, 2, 3]
    assert batch_buckets(100)[-3:] == [64, 80, 96, 100][-3:]
    assert context_buckets(1000) == [256, 512, 1000]
    assert context_buckets(100) == [100]


def test_one_logical_cpu_per_core(tmp_path):
    for cpu, siblings in {0: "0,2", 1: "1,3", 2: "0,2", 3: "1,3"}.items():
        folder = tmp_path / f"cpu{cpu}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(siblings + "\n")
    assert physical_cpu_ids({0, 1, 2, 3}, tmp_path) == [0, 1]
    assert physical_cpu_ids({2, 3}, tmp_path) == [2, 3]
