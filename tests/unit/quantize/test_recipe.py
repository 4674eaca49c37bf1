"""The plan, its patterns, and the bytes that follow from it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from serve_app.bench.decode import SHAPES
from serve_app.core.errors import ConfigError
from serve_app.models.loading.source import expected_shapes
from serve_app.quantize.recipe import (
    PRESETS,
    Recipe,
    make_plan,
    matches,
    merged,
    packed_bytes,
    planned_bytes,
)

LAYERS = {
    f"model.layers.{layer}.{part}": (64, 128)
    for layer in range(4)
    for part in ("self_attn.q_proj", "mlp.down_proj")
} | {"lm_head": (256, 64)}


def _linear(shapes):
    return {
        name.removesuffix(".weight"): shape
        for name, shape in shapes.items()
        if name.endswith(("_proj.weight", "lm_head.weight"))
    }


@pytest.mark.parametrize("group_size", [32, 128])
def test_seven_billion_weights_take_at_most_two_fifths_of_bfloat16(group_size):
    shapes = expected_shapes(SHAPES["qwen2-7b"])
    plan = make_plan(_linear(shapes), merged(PRESETS["compact"], group_size=group_size))
    with torch.device("meta"):
        dense = sum(torch.empty(s, dtype=torch.bfloat16).nbytes for s in shapes.values())
    packed = planned_bytes(plan, shapes.items(), itemsize=2)
    tokenizer = 20_000_000
    assert 14.5e9 < dense < 15.5e9
    assert (packed + tokenizer) / (dense + tokenizer) <= 0.40


def test_packed_bytes_are_those_of_the_tensors():
    rows, columns, group = 96, 256, 64
    for bits in (4, 8):
        tensors = (
            torch.empty(columns * bits // 32, rows, dtype=torch.int32),
            torch.empty(columns // group, rows, dtype=torch.float16),
            torch.empty(columns // group, rows * bits // 32, dtype=torch.int32),
        )
        assert packed_bytes(rows, columns, bits, group) == sum(t.nbytes for t in tensors)


def test_plan_skips_widens_and_keeps_what_does_not_fit():
    shapes = {**LAYERS, "model.layers.0.odd_proj": (8, 48)}
    plan = make_plan(shapes, Recipe(wide=("last:1",), skip=("lm_head", "first:1:q_proj")))
    assert plan.bits_of("lm_head") is None
    assert plan.bits_of("model.layers.0.self_attn.q_proj") is None
    assert plan.bits_of("model.layers.0.mlp.down_proj") == 4
    assert plan.bits_of("model.layers.3.mlp.down_proj") == 8
    assert {m.name: m.reason for m in plan.dense}["model.layers.0.odd_proj"].startswith("48 ")


def test_a_pattern_that_meets_nothing_is_an_error():
    with pytest.raises(ConfigError, match="--skip: 'dwon_proj' meets no matrix"):
        make_plan(LAYERS, Recipe(skip=("lm_head", "dwon_proj")))
    with pytest.raises(ConfigError, match="no matrix is left"):
        make_plan(LAYERS, Recipe(skip=(".",)))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"bits": 3}, "--bits: 3 is not among 4, 8"),
        ({"group_size": 48}, "--group-size"),
        ({"algorithm": "hqq"}, "--algorithm"),
        ({"num_samples": 0}, "--num-samples"),
        ({"iterations": -1}, "--iterations"),
        ({"skip": ("(",)}, "--skip: '\\('"),
        ({"act_order": True}, "--act-order"),
    ],
)
def test_a_bad_value_is_named(changes, named):
    with pytest.raises(ConfigError, match=named):
        Recipe(**changes)


@given(
    st.builds(
        Recipe,
        algorithm=st.sampled_from(["rtn", "gptq", "autoround", "awq"]),
        bits=st.sampled_from([4, 8]),
        is_symmetric=st.booleans(),
        wide=st.lists(st.sampled_from(["down_proj", "last:3", "first:2:v_proj"])).map(tuple),
    )
)
def test_a_recipe_survives_json(recipe):
    assert Recipe.from_dict({**recipe.to_dict(), "later_field": 1}) == recipe


@given(st.integers(0, 11), st.integers(1, 12))
def test_first_and_last_divide_the_layers(layer, count):
    name = f"model.layers.{layer}.mlp.up_proj"
    assert matches(f"first:{count}", name, 12) == (layer < count)
    assert matches(f"last:{count}:up_proj", name, 12) == (layer >= 12 - count)
    assert not matches(f"last:{count}", "lm_head", 12)
