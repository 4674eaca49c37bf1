from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.api.protocol.sampling import SamplingFields
from serve_app.api.sampling import (
    LogprobsWish,
    TokenLimit,
    build_sampling,
    resolve_max_tokens,
    seed_of_choice,
)
from serve_app.core.errors import ClientError, ContextLengthError
from serve_app.core.events import EngineCapabilities
from serve_app.core.requests import ModelCard


def card(**defaults: object) -> ModelCard:
    return ModelCard("m", (), 100, 50, 0, "m", (2, 3), dict(defaults))


SEEDS = st.integers(-(2**63), 2**63 - 1)


@given(SEEDS, st.integers(1, 16))
def test_seeds_of_choices_differ_and_stay_in_64_bits(seed, n):
    seeds = [seed_of_choice(seed, choice) for choice in range(n)]
    assert seeds[0] == seed
    assert len(set(seeds)) == n
    assert all(-(2**63) <= value < 2**63 for value in seeds)


def test_no_seed_stays_no_seed():
    assert seed_of_choice(None, 3) is None


@given(st.integers(0, 120), st.none() | st.integers(1, 120), st.none() | st.integers(1, 200))
def test_length_never_exceeds_the_context(num_prompt, requested, default):
    limit = TokenLimit(requested)
    if num_prompt >= 100 or (requested or 0) > 100 - num_prompt:
        with pytest.raises(ContextLengthError):
            resolve_max_tokens(limit, card(), num_prompt, default)
        return
    length = resolve_max_tokens(limit, card(), num_prompt, default)
    assert 1 <= length <= 100 - num_prompt
    if requested is not None:
        assert length == requested
    elif default is None:
        assert length == 100 - num_prompt


def test_defaults_of_length_in_their_order():
    limit = TokenLimit(None, endpoint_default=16)
    assert resolve_max_tokens(limit, card(), 10, None) == 16
    assert resolve_max_tokens(limit, card(), 10, 20) == 20
    assert resolve_max_tokens(limit, card(max_tokens=30), 10, 20) == 30
    assert resolve_max_tokens(limit, card(), 95, None) == 5


def test_stop_ids_are_the_clients_and_the_models_once_each():
    fields = SamplingFields.model_validate_json('{"stop_token_ids": [7, 3]}')
    sampling = build_sampling(fields, card(), EngineCapabilities(), 5, LogprobsWish())
    assert sampling.stop_token_ids == (7, 3, 2)


def test_logit_bias_is_checked_against_the_vocabulary():
    fields = SamplingFields.model_validate_json('{"logit_bias": {"49": 1.5}}')
    sampling = build_sampling(fields, card(), EngineCapabilities(), 5, LogprobsWish())
    assert sampling.logit_bias == ((49, 1.5),)
    outside = SamplingFields.model_validate_json('{"logit_bias": {"50": 1}}')
    with pytest.raises(ClientError, match="below 50"):
        build_sampling(outside, card(), EngineCapabilities(), 5, LogprobsWish())


def test_top_k_minus_one_is_off():
    fields = SamplingFields.model_validate_json('{"top_k": -1}')
    assert build_sampling(fields, card(), EngineCapabilities(), 5, LogprobsWish()).top_k == 0
