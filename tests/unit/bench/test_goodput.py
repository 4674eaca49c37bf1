from __future__ import annotations

import pytest

from serve_app.bench.goodput import parse_slo
from serve_app.bench.load import RequestRecord
from serve_app.core.errors import ConfigError


def record(ttft_s: float | None = 0.1, e2el_s: float = 1.1, num_tokens: int = 11) -> RequestRecord:
    return RequestRecord("k", 0.0, ttft_s, e2el_s, num_output_tokens=num_tokens)


def test_bounds_are_read_with_their_names() -> None:
    assert parse_slo("ttft_ms=500, tpot_ms=100").to_dict() == {"ttft_ms": 500, "tpot_ms": 100}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no bound given"),
        ("ttft=5", "ttft=5 is not of the form"),
        ("ttft_ms", "ttft_ms is not of the form"),
        ("ttft_ms=fast", "must be a number above 0"),
        ("ttft_ms=0", "must be a number above 0"),
        ("ttft_ms=nan", "must be a number above 0"),
    ],
)
def test_nonsense_is_named(text: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=rf"--slo: .*{reason}"):
        parse_slo(text)


@pytest.mark.parametrize(
    ("slo", "is_met"),
    [
        ("ttft_ms=100", True),
        ("ttft_ms=99", False),
        ("tpot_ms=100.01", True),
        ("tpot_ms=99", False),
        ("e2el_ms=1100.01", True),
        ("ttft_ms=200,tpot_ms=99", False),
    ],
)
def test_every_bound_counts(slo: str, is_met: bool) -> None:
    assert parse_slo(slo).is_met(record()) is is_met


def test_a_failed_request_meets_nothing_and_one_token_has_no_tpot() -> None:
    failed = record()
    failed.error = "HTTP 503"

    assert not parse_slo("ttft_ms=1000").is_met(failed)
    assert parse_slo("tpot_ms=1").is_met(record(num_tokens=1))
