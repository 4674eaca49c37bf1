from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.bench.load import LoadResult, RequestRecord
from serve_app.bench.report import (
    format_table,
    load_table,
    percentile,
    summarise,
    to_json_values,
)

finite = st.floats(-1e6, 1e6)


def record(ttft_s: float, e2el_s: float, num_output: int, **changes: object) -> RequestRecord:
    made = RequestRecord("fixed", 0.0, ttft_s, e2el_s, num_prompt_tokens=10)
    made.num_output_tokens = num_output
    for name, value in changes.items():
        setattr(made, name, value)
    return made


@given(values=st.lists(finite, min_size=1, max_size=30), percent=st.floats(0, 100))
def test_percentile_is_the_usual_one(values: list[float], percent: float) -> None:
    assert percentile(values, percent) == pytest.approx(np.percentile(values, percent), abs=1e-6)


def test_figures_of_a_run() -> None:
    good = record(0.1, 1.1, 11, itls_s=[0.1, 0.3])
    failed = record(9.0, 9.0, 99, error="HTTP 503: full")
    result = LoadResult((good, failed), duration_s=2.0, client_cpu_s=0.011, max_in_flight=2)

    figures = summarise(result)

    assert (figures["completed"], figures["failed"]) == (1, 1)
    assert figures["errors"] == ["HTTP 503: full"]
    assert figures["request_throughput"] == 0.5
    assert figures["output_throughput"] == 5.5
    assert figures["total_token_throughput"] == 10.5
    assert figures["mean_ttft_ms"] == pytest.approx(100)
    assert figures["median_tpot_ms"] == pytest.approx(100)
    assert figures["mean_itl_ms"] == pytest.approx(200)
    assert figures["p99_e2el_ms"] == pytest.approx(1100)
    assert figures["client_cpu_us_per_token"] == pytest.approx(1000)
    table = load_table([{"load": "x", **figures}])
    assert table.splitlines()[0].startswith("load")
    assert "goodput/s" not in table
    assert "goodput/s" in load_table([{"load": "x", **figures, "request_goodput": 1.0}])


def test_run_without_answers_has_no_latencies_and_is_valid_json() -> None:
    figures = summarise(LoadResult((), 0.0, 0.0, 0))

    assert math.isnan(figures["p99_ttft_ms"])
    assert (
        json.loads(json.dumps(to_json_values([figures]), allow_nan=False))[0]["mean_itl_ms"] is None
    )


def test_table_is_aligned() -> None:
    table = format_table(("load", "tokens/s"), [["a", 1234.56], ["longer", math.nan]])

    assert table.splitlines() == [
        "load    tokens/s",
        "------  --------",
        "a        1,234.6",
        "longer         -",
    ]
