from __future__ import annotations

import json
import random
from collections import Counter

import pytest

from serve_app.bench.soak import (
    SoakOptions,
    SoakRequest,
    SoakTally,
    _judged,
    lines_of,
    make_request,
)

OPTIONS = SoakOptions()
PLAIN = SoakRequest("completions", "/v1/completions", b"{}")
BAD = SoakRequest("bad chat", "/v1/chat/completions", b"{", is_bad=True)


def requests(count: int, seed: int = 1) -> list[SoakRequest]:
    rng = random.Random(seed)
    return [make_request(rng, OPTIONS, "m") for _ in range(count)]


def test_the_mix_has_every_kind_and_the_same_seed_asks_the_same() -> None:
    made = requests(600)
    kinds = Counter(request.kind.removeprefix("bad ") for request in made)
    assert kinds.keys() == {"chat", "completions", "responses", "generate", "long"}
    assert 30 <= sum(request.is_bad for request in made) <= 90
    assert 90 <= sum(request.leave_after_s is not None for request in made) <= 190
    assert made == requests(600)
    assert made != requests(600, seed=2)
    good = [json.loads(request.body) for request in made if not request.is_bad]
    assert {body["stream"] for body in good} == {True, False}
    assert {body["model"] for body in good} == {"m"}


@pytest.mark.parametrize(
    ("request_", "status", "body", "end", "is_wrong"),
    [
        (PLAIN, 200, b'{"choices": []}', "answered", False),
        (PLAIN, 200, b'data: {"a": 1}\n\ndata: [DONE]\n\n', "answered", False),
        (PLAIN, 200, b"event: response.completed\ndata: {}\n\n", "answered", False),
        (PLAIN, 200, b'data: {"a": 1}\n\n', "error", True),
        (PLAIN, 200, b'data: {"error": {"code": "x"}}\n\ndata: [DONE]\n\n', "error", True),
        (PLAIN, 200, b"event: response.failed\ndata: {}\n\n", "error", True),
        (PLAIN, 503, b'{"error": {"code": "queue_full"}}', "refused", False),
        (PLAIN, 503, b"Service Unavailable", "refused", True),
        (PLAIN, 500, b'{"error": {}}', "error", True),
        (BAD, 400, b'{"error": {}}', "bad", False),
        (BAD, 413, b'{"error": {}}', "bad", False),
        (BAD, 200, b"{}", "bad", True),
        (BAD, 500, b'{"error": {}}', "bad", True),
    ],
)
def test_each_end_is_judged(
    request_: SoakRequest, status: int, body: bytes, end: str, is_wrong: bool
) -> None:
    seen, wrong = _judged(request_, status, body)
    assert (seen, bool(wrong)) == (end, is_wrong)


def test_what_is_left_or_went_wrong_breaks_a_limit() -> None:
    tally = SoakTally(Counter(answered=5, left=2))
    assert all(line.is_held for line in lines_of(tally, {}, []))
    assert not all(line.is_held for line in lines_of(tally, {"kv_cache_usage_perc": 0.01}, []))
    tally.wrong["chat: status 500"] += 1
    assert not all(line.is_held for line in lines_of(tally, {}, []))
    assert not all(line.is_held for line in lines_of(SoakTally(), {}, []))
