from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.core.sampling import SamplingParams
from serve_app.engine.random_numbers import uniforms
from serve_app.engine.sampler import FAILED_TOKEN_ID, DraftHistory, Sampler, SamplingPlan
from serve_app.engine.sequence import Sequence
from serve_app.engine.truncation import NUM_CANDIDATES, exact_thresholds, thresholds
from serve_app.models.kernels._triton import HAS_TRITON

CPU = torch.device("cpu")


class Bench:
    """One sampler, sequences in its slots, and a plain way to draw from it."""

    def __init__(
        self, vocab_size: int, *params: SamplingParams, device: torch.device = CPU
    ) -> None:
        self.sampler = Sampler(vocab_size, max(len(params), 1), device)
        self.sequences = []
        for slot, one in enumerate(params):
            sequence = Sequence(f"r{slot}", [1, 2, 2], one, arrival=slot)
            sequence.slot = slot
            self.sampler.load(sequence)
            self.sequences.append(sequence)

    def draw(self, logits, positions, slots=None, allowed_mask=None):
        slots = torch.arange(len(logits)) if slots is None else torch.tensor(slots)
        slots = slots.to(logits.device)
        positions = torch.as_tensor(positions).expand(len(logits)).to(logits.device)
        plan = SamplingPlan.of([self.sequences[slot] for slot in slots.tolist()])
        return self.sampler.sample(logits, slots, positions, plan, allowed_mask)

    def remember(self, token_ids: torch.Tensor) -> None:
        """Load every slot anew, as if `token_ids` had been drawn for it."""
        for sequence, token_id in zip(self.sequences, token_ids.tolist(), strict=True):
            sequence.append_placeholder()
            sequence.resolve(token_id)
            self.sampler.load(sequence)

    def frequencies(self, logits: torch.Tensor, count: int = 20_000) -> torch.Tensor:
        """How often each id came, over `count` positions of slot 0."""
        plan = SamplingPlan.of(self.sequences[:1])
        ids = self.sampler.sample(
            logits.expand(count, -1),
            torch.zeros(count, dtype=torch.int64),
            torch.arange(count),
            plan,
        ).token_ids
        return torch.bincount(ids, minlength=logits.shape[-1]) / count


def plain_distribution(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Temperature, top-k, top-p, min-p by sorting; float64 [V]."""
    probs = (logits.double() / params.temperature).softmax(-1)
    order = probs.argsort(descending=True, stable=True)
    ranked = probs[order]
    if params.top_k:
        ranked[params.top_k :] = 0
    ranked /= ranked.sum()
    if params.top_p < 1:
        ranked[ranked.cumsum(0) - ranked >= params.top_p] = 0
    ranked[ranked < params.min_p * ranked[0]] = 0
    out = torch.zeros_like(probs)
    out[order] = ranked / ranked.sum()
    return out


def chi_square(observed: torch.Tensor, expected: torch.Tensor, count: int) -> tuple[float, int]:
    kept = expected * count >= 5
    difference = (observed.double() - expected)[kept] * count
    return float((difference**2 / (expected[kept] * count)).sum()), int(kept.sum()) - 1


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(seed=1),
        SamplingParams(seed=2, temperature=0.6),
        SamplingParams(seed=3, top_k=5),
        SamplingParams(seed=4, top_p=0.7),
        SamplingParams(seed=5, min_p=0.2),
        SamplingParams(seed=6, temperature=1.5, top_k=20, top_p=0.8, min_p=0.05),
    ],
)
@pytest.mark.parametrize("vocab_size", [40, 700])
def test_draws_follow_the_distribution(params, vocab_size):
    logits = torch.randn(1, vocab_size, generator=torch.Generator().manual_seed(9)) * 2
    expected = plain_distribution(logits[0], params)
    observed = Bench(vocab_size, params).frequencies(logits)
    assert observed[expected == 0].sum() == 0, "a token outside the kept set was drawn"
    statistic, degrees = chi_square(observed, expected, 20_000)
    # Wilson–Hilferty: z beyond 4 has a chance of 3e-5 (and the seeds are fixed).
    scale = 2 / (9 * max(degrees, 1))
    z = ((statistic / max(degrees, 1)) ** (1 / 3) - (1 - scale)) / math.sqrt(scale)
    assert z < 4, (statistic, degrees)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    vocab_size=st.sampled_from([8, 300, 2000]),
    spread=st.floats(0.01, 4.0),
    top_k=st.sampled_from([0, 1, 7, NUM_CANDIDATES + 40]),
    top_p=st.sampled_from([0.1, 0.5, 0.9, 0.99, 1.0]),
)
def test_thresholds_keep_what_sorting_keeps(seed, vocab_size, spread, top_k, top_p):
    logits = torch.randn(3, vocab_size, generator=torch.Generator().manual_seed(seed)) * spread
    ks, ps = torch.full((3,), top_k), torch.full((3,), top_p)
    for found in (
        thresholds(logits, ks, ps, may_exceed=True, has_large_top_k=top_k > NUM_CANDIDATES),
        exact_thresholds(logits, ks, ps),
    ):
        kept = logits >= found.unsqueeze(-1)
        for row in range(3):
            params = SamplingParams(top_k=min(top_k, vocab_size), top_p=top_p)
            wanted = plain_distribution(logits[row], params) > 0
            # float32 sums may differ from float64 ones by the token at the very edge.
            assert int((kept[row] ^ wanted).sum()) <= 1


def test_greedy_takes_the_largest():
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, 0.0, 1.0]])
    params = SamplingParams(temperature=0.0)
    assert Bench(3, params, params).draw(logits, 3).token_ids.tolist() == [1, 0]


def test_greedy_and_random_rows_share_a_batch():
    logits = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    params = [SamplingParams(temperature=0.0), SamplingParams(seed=5, top_k=50)]
    both = Bench(50, *params).draw(logits, 7).token_ids
    assert both[0] == logits[0].argmax()
    assert both[1] == Bench(50, params[1]).draw(logits[1:], 7).token_ids[0]


def test_a_row_depends_on_seed_and_position_alone():
    logits = torch.randn(1, 1000, generator=torch.Generator().manual_seed(1))
    params = [
        SamplingParams(seed=seed, top_p=p) for seed, p in ((1, 1.0), (2, 0.5), (3, 0.95), (1, 1.0))
    ]
    bench = Bench(1000, *params)
    together = bench.draw(logits.expand(4, -1), 11).token_ids.tolist()
    backwards = bench.draw(logits.expand(4, -1), 11, slots=[3, 2, 1, 0]).token_ids.tolist()
    assert backwards == together[::-1]
    assert together[0] == together[3]
    for slot, one in enumerate(params):
        assert Bench(1000, one).draw(logits, 11).token_ids.item() == together[slot]
    over_positions = {bench.draw(logits, p, slots=[0]).token_ids.item() for p in range(50)}
    assert len(over_positions) > 20


def test_uniforms_are_uniform_and_independent():
    first, second = uniforms(torch.full((50_000,), 3), torch.arange(50_000))
    for values in (first, second):
        assert values.min() >= 0
        assert values.max() < 1
        assert values.mean().item() == pytest.approx(0.5, abs=0.01)
        assert values.std().item() == pytest.approx(1 / math.sqrt(12), abs=0.01)
    assert abs(torch.corrcoef(torch.stack([first, second]))[0, 1].item()) < 0.02
    assert abs(torch.corrcoef(torch.stack([first[1:], first[:-1]]))[0, 1].item()) < 0.02


def test_penalties_follow_their_formulas():
    params = SamplingParams(
        temperature=0.0,
        repetition_penalty=1.5,
        frequency_penalty=0.3,
        presence_penalty=0.2,
        logprobs=0,
    )
    bench = Bench(6, params)
    output: list[int] = []
    generator = torch.Generator().manual_seed(4)
    for place in range(3, 12):
        logits = torch.randn(1, 6, generator=generator) * 0.3
        expected = logits[0].clone()
        for token_id in range(6):
            count = output.count(token_id)
            if token_id in (1, 2) or count:
                value = expected[token_id]
                expected[token_id] = value / 1.5 if value > 0 else value * 1.5
            expected[token_id] -= 0.3 * count + 0.2 * (count > 0)
        drawn = bench.draw(logits, place)
        assert drawn.token_ids.item() == expected.argmax()
        raw = logits.log_softmax(-1)[0, drawn.token_ids.item()]
        assert drawn.logprobs.item() == pytest.approx(raw.item(), abs=1e-5)
        output.append(drawn.token_ids.item())
    assert len(set(output)) > 3


def test_reloaded_counts_are_those_that_were_kept():
    params = SamplingParams(temperature=0.0, frequency_penalty=1.0)
    bench = Bench(8, params)
    generator = torch.Generator().manual_seed(4)
    sequence = bench.sequences[0]
    for place in range(3, 9):
        sequence.token_ids.append(
            bench.draw(torch.randn(1, 8, generator=generator), place).token_ids.item()
        )
    logits = torch.randn(1, 8, generator=generator)
    kept = bench.sampler._adjust(
        logits, torch.tensor([0]), torch.tensor([9]), SamplingPlan.of([sequence]), None
    )
    bench.sampler.load(sequence)
    again = bench.sampler._adjust(
        logits, torch.tensor([0]), torch.tensor([9]), SamplingPlan.of([sequence]), None
    )
    assert torch.equal(kept, again)


def test_rows_of_a_draft_count_the_tokens_before_them():
    params = SamplingParams(
        temperature=0.9, seed=5, repetition_penalty=1.4, frequency_penalty=0.6, presence_penalty=0.2
    )
    neighbour = SamplingParams(temperature=0.9, seed=6, frequency_penalty=0.5)
    draft, logits = [3, 3, 6], torch.randn(5, 8, generator=torch.Generator().manual_seed(4))
    alone = Bench(8, params, neighbour)
    expected = []
    for place, row in enumerate(logits[:4], start=3):
        expected.append(alone.draw(row[None], place, slots=[0]).token_ids.item())
        alone.sequences[0].token_ids = [1, 2, 2, *draft[: place - 2]]
        alone.sampler.load(alone.sequences[0])
    expected.append(alone.draw(logits[4:], 3, slots=[1]).token_ids.item())

    together = Bench(8, params, neighbour)
    slots = torch.tensor([0, 0, 0, 0, 1])
    history = DraftHistory(
        rows=torch.tensor([1, 2, 2, 3, 3, 3]),
        token_ids=torch.tensor([3, 3, 3, 3, 3, 6]),
        count_slots=torch.tensor([2, 2, 2, 2, 1]),
    )
    plan = SamplingPlan.of(together.sequences)
    places = torch.tensor([3, 4, 5, 6, 3])
    drawn = together.sampler.sample(logits, slots, places, plan, None, history).token_ids
    assert drawn.tolist() == expected
    assert together.sampler._counts[0].sum() == 0, "which of them hold is not known yet"
    together.sampler.count(0, draft)
    assert together.sampler._counts[0].tolist() == [0, 0, 0, 2, 0, 0, 1, 0]
    assert together.sampler._counts[1].sum() == 1


def test_logit_bias_is_added_and_cleared_with_the_slot():
    logits = torch.zeros(1, 5)
    bench = Bench(5, SamplingParams(temperature=0.0, logit_bias=((3, 2.0), (4, -100.0))))
    assert bench.draw(logits, 3).token_ids.item() == 3
    plain = Sequence("next", [1], SamplingParams(temperature=0.0, logit_bias=((2, 1.0),)), 1)
    plain.slot = 0
    bench.sampler.load(plain)
    bench.sequences[0] = plain
    assert bench.draw(logits, 3).token_ids.item() == 2


def test_stop_ids_are_banned_until_min_tokens():
    logits = torch.tensor([[0.0, 1.0, 9.0, 8.0, 7.0]])
    params = SamplingParams(temperature=0.0, min_tokens=2, stop_token_ids=(2, 3, 4))
    bench = Bench(5, params)  # the prompt has 3 tokens
    assert [bench.draw(logits, p).token_ids.item() for p in (3, 4, 5)] == [1, 1, 2]


def test_min_tokens_without_stop_ids_bans_nothing():
    logits = torch.tensor([[9.0, 1.0, 2.0], [0.0, 9.0, 2.0]])
    early = SamplingParams(temperature=0.0, min_tokens=2, stop_token_ids=(1,))
    bench = Bench(3, SamplingParams(temperature=0.0, min_tokens=2), early)
    assert bench.draw(logits, 3).token_ids.tolist() == [0, 2]


def test_the_allowed_mask_forbids():
    logits = torch.tensor([[0.0, 1.0, 9.0]])
    mask = torch.tensor([[True, True, False]])
    bench = Bench(3, SamplingParams(temperature=0.0))
    assert bench.draw(logits, 3, allowed_mask=mask).token_ids.item() == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_non_finite_logits_fail_their_row_only(bad, temperature):
    logits = torch.zeros(2, 300)
    logits[0, 17] = bad
    logits[1, 5] = 50.0
    params = SamplingParams(temperature=temperature, seed=1, top_p=0.9)
    bench = Bench(300, params, params)
    assert bench.draw(logits, 3).token_ids.tolist() == [FAILED_TOKEN_ID, 5]
    assert 0 <= bench.sampler.last_token_ids[0] < 300, "the next input must be a valid id"


def test_top_logprobs_are_the_raw_best():
    logits = torch.randn(2, 60, generator=torch.Generator().manual_seed(2))
    params = SamplingParams(seed=1, temperature=0.5, top_k=2, logprobs=4)
    drawn = Bench(60, params, params).draw(logits, 3)
    raw = logits.log_softmax(-1)
    assert torch.equal(drawn.top_ids, raw.topk(4).indices)
    assert torch.allclose(drawn.top_logprobs, raw.topk(4).values, atol=1e-5)
    assert torch.allclose(drawn.logprobs, raw.gather(1, drawn.token_ids[:, None])[:, 0], atol=1e-5)


def _card() -> torch.device | None:
    found = torch.accelerator.current_accelerator(check_available=True)
    return None if found is None else torch.device(found.type, 0)


@pytest.mark.skipif(
    _card() is None or not HAS_TRITON, reason="no card with Triton: the plain sampler runs"
)
@pytest.mark.parametrize("vocab_size", [300, 9000, 152064])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"top_p": 0.9},
        {"top_k": 50},
        {"top_k": 400, "top_p": 0.7, "min_p": 0.01},
        {"min_p": 0.3},
        {"top_p": 0.95, "repetition_penalty": 1.2, "frequency_penalty": 0.3},
        {"presence_penalty": 0.5, "logit_bias": ((5, 3.0),)},
    ],
)
def test_the_cards_kernels_choose_as_the_plain_sampler(vocab_size, changes):
    device = _card()
    params = [
        SamplingParams(seed=i, temperature=0.0 if i % 5 == 0 else 0.3 + i / 16, **changes)
        for i in range(32)
    ]
    plain, card = (Bench(vocab_size, *params, device=device) for device in (CPU, device))
    generator = torch.Generator().manual_seed(3)
    num_same = 0
    for position in range(8):
        logits = (torch.randn(32, vocab_size, generator=generator) * 3).bfloat16().float()
        expected = plain.draw(logits, position).token_ids
        ids = card.draw(logits.to(device), position).token_ids.cpu()
        assert torch.equal(ids[::5], expected[::5]), "greedy rows have one answer"
        num_same += int((ids == expected).sum())
        for bench in (plain, card):  # the same past, whatever was drawn
            bench.remember(expected)
    # sums of another order move a draw's target by some 1e-6 of the total
    assert num_same >= 250, num_same
