"""The short form of `xeray bench soak`: a few seconds of everything leave nothing behind."""

from __future__ import annotations

from typing import Any

from serve_app.bench.load import Target
from serve_app.bench.soak import SoakOptions, leftovers, soak

OPTIONS = SoakOptions(
    duration_s=4.0, num_clients=6, output_tokens=12, long_words=60, cancel_share=0.4, bad_share=0.2
)


async def test_a_mixed_load_with_clients_that_leave_leaves_nothing_behind(
    service: Any, model: str
) -> None:
    before = len(service.processes())
    tally = await soak(Target.from_url(service.url, model), OPTIONS)
    assert tally.wrong == {}
    assert tally.ends["answered"] > 0
    assert tally.ends["left"] > 0
    assert tally.ends["bad"] > 0
    assert await leftovers(service.url) == {}, "no block held, nothing runs, waits or is in flight"
    assert len(service.processes()) == before, "no process was lost or started anew"
