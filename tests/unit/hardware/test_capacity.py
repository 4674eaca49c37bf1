from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.hardware.capacity import (
    BLOCK_TOKENS,
    MemoryPlan,
    alternatives,
    default_dtype,
    smallest_memory_bytes,
)
from serve_app.hardware.memory import ModelShape

SHAPE_13B = ModelShape("llama-13b", 40, 5120, 13824, 40, 40, 128, 32000, 4096)
GIB = 1 << 30


def plan(**changes: object) -> MemoryPlan:
    base = MemoryPlan(
        shape=SHAPE_13B,
        device="xpu",
        memory_bytes=16 * GIB,
        weight_format="dense",
        dtype="float16",
        max_model_len=4096,
        max_num_seqs=8,
        num_batched_tokens=2048,
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def test_13b_in_16_bits_does_not_fit_an_a770() -> None:
    dense = plan()

    assert dense.weights_bytes > 16 * GIB
    assert not dense.fits
    assert dense.left_bytes < 0


def test_13b_in_int4_fits_an_a770() -> None:
    int4 = plan(weight_format="int4")

    assert int4.fits
    assert int4.num_full_sequences >= 1
    assert int4.needed_bytes + int4.left_bytes == 16 * GIB


def test_every_alternative_fits_and_names_what_changed() -> None:
    found = alternatives(plan())

    assert found
    assert found[0][0].startswith("--weights int")
    for words, candidate in found:
        assert candidate.fits
        assert words.startswith("--")


def test_a_long_context_is_shortened_before_anything_is_refused() -> None:
    too_long = plan(weight_format="int4", memory_bytes=10 * GIB)

    assert not too_long.fits
    assert any("--max-model-len" in words for words, _ in alternatives(too_long))


def test_nothing_helps_where_the_weights_alone_are_too_large() -> None:
    assert alternatives(plan(memory_bytes=2 * GIB)) == []


def test_kv_tokens_named_by_the_config_are_taken() -> None:
    assert plan(weight_format="int4", kv_cache_tokens=5000).kv_tokens == 4992


def test_the_kv_cache_is_never_larger_than_all_sequences_need() -> None:
    roomy = plan(weight_format="int4", memory_bytes=400 * GIB)

    assert roomy.kv_tokens == 8 * 4096
    assert roomy.num_full_sequences == 8


def test_a_cache_without_room_for_one_sequence_does_not_fit() -> None:
    starved = plan(weight_format="int4", memory_bytes=64 * GIB, kv_cache_tokens=4000)

    assert starved.left_bytes > 0
    assert not starved.fits


@given(
    memory_gib=st.integers(1, 200),
    weight_format=st.sampled_from(["dense", "int8", "int4"]),
    max_model_len=st.integers(1, 4096),
    max_num_seqs=st.integers(1, 64),
)
def test_what_a_plan_promises(
    memory_gib: int, weight_format: str, max_model_len: int, max_num_seqs: int
) -> None:
    made = plan(
        memory_bytes=memory_gib * GIB,
        weight_format=weight_format,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
    )

    assert made.kv_tokens % BLOCK_TOKENS == 0
    assert made.num_full_sequences * max_model_len <= made.kv_tokens
    if made.fits:
        assert made.needed_bytes <= made.memory_bytes
        assert smallest_memory_bytes(made) <= made.memory_bytes
    for _, candidate in alternatives(made):
        assert candidate.fits


@pytest.mark.parametrize(
    ("device", "is_fast", "dtype"),
    [("cpu", True, "bfloat16"), ("cpu", False, "float32"), ("xpu", False, "bfloat16")],
)
def test_default_dtype(device: str, is_fast: bool, dtype: str) -> None:
    assert default_dtype(device, is_fast) == dtype
