"""A sequence that goes on from another engine: its rest is what it would have been there."""

from __future__ import annotations

from dataclasses import replace

import pytest

from serve_app.core.sampling import SamplingParams

NUM_TOKENS = 24
SAMPLINGS = {
    "greedy": SamplingParams(temperature=0.0),
    "seeded": SamplingParams(temperature=1.1, top_p=0.95, seed=11),
    "penalties": SamplingParams(
        temperature=0.0, frequency_penalty=1.5, presence_penalty=0.8, repetition_penalty=1.1
    ),
    "seeded penalties": SamplingParams(temperature=0.9, seed=-5, frequency_penalty=2.0),
}


@pytest.mark.parametrize("name", SAMPLINGS)
def test_the_rest_is_the_same_after_any_cut(make_engine, run_all, random_prompts, name):
    sampling = replace(SAMPLINGS[name], max_tokens=NUM_TOKENS)
    (prompt,) = random_prompts(1, seed=4)
    whole = run_all(make_engine(), {"whole": (prompt, sampling)}).ids("whole")
    assert len(set(whole)) > 4

    engine = make_engine()
    for cut in (1, 7, NUM_TOKENS - 1):
        rest = replace(sampling, max_tokens=NUM_TOKENS - cut, num_prior_tokens=cut)
        request = {f"cut{cut}": ([*prompt, *whole[:cut]], rest)}
        assert run_all(engine, request).ids(f"cut{cut}") == whole[cut:]
