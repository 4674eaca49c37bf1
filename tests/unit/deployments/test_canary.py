from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.config.sections_canary import CanarySection
from serve_app.core.errors import ClientError, ConfigError, EngineError, OverloadedError
from serve_app.core.events import EngineCapabilities
from serve_app.core.requests import (
    GenerateChunk,
    GenerateRequest,
    ModelCard,
    PreparedPrompt,
    PrepareRequest,
    ServiceHealth,
)
from serve_app.core.sampling import SamplingParams
from serve_app.deployments import canary_backend as canary_backend_module
from serve_app.deployments.canary import SplitBackend, takes_canary


class FakeVersion:
    """A Backend that says who it is."""

    def __init__(self, name: str, model_id: str = "m", *, logprobs: bool = True) -> None:
        self.name = name
        self.card = ModelCard(model_id, ("*",), 4096, 100, 0, "", (0,))
        self.able = EngineCapabilities(logprobs=logprobs)
        self.error: Exception | None = None

    async def models(self) -> list[ModelCard]:
        return [self.card]

    async def capabilities(self, model_id: str) -> EngineCapabilities:
        return self.able

    async def prepare(self, model_id: str, request: PrepareRequest) -> PreparedPrompt:
        return PreparedPrompt(tuple(self.name.encode()))

    async def health(self) -> ServiceHealth:
        return ServiceHealth(True, self.name)

    async def generate(
        self, model_id: str, request: GenerateRequest
    ) -> AsyncGenerator[GenerateChunk, None]:
        if self.error is not None:
            raise self.error
        yield GenerateChunk(self.name)
        yield GenerateChunk("", finish_reason="stop", num_generated=3)


def request(key: str) -> GenerateRequest:
    return GenerateRequest(
        f"cmpl-{key}-0", (1,), SamplingParams(), trace_context={"x-request-id": key}
    )


async def answer(split: SplitBackend, key: str, model_id: str = "m") -> str:
    return "".join([chunk.text async for chunk in split.generate(model_id, request(key))])


@given(st.text(min_size=1), st.floats(0, 100), st.floats(0, 100))
def test_a_larger_share_contains_the_smaller_one(key: str, left: float, right: float) -> None:
    small, large = sorted((left, right))
    assert not takes_canary(key, small) or takes_canary(key, large)
    assert takes_canary(key, 100.0)
    assert not takes_canary(key, 0.0)


def test_the_share_is_what_was_asked_for() -> None:
    count = sum(takes_canary(f"request-{i}", 20.0) for i in range(5000))
    assert 900 < count < 1100


class AbsentVersion(FakeVersion):
    """A new version that starts, fails, or ends: nobody answers."""

    async def models(self) -> list[ModelCard]:
        raise OverloadedError("no preprocessor is available", code="no_replica")

    async def capabilities(self, model_id: str) -> EngineCapabilities:
        raise OverloadedError("no model replica is up", code="no_replica")

    async def prepare(self, model_id: str, request: PrepareRequest) -> PreparedPrompt:
        raise OverloadedError("no preprocessor is available", code="no_replica")


@pytest.mark.parametrize("percent", [0.0, 50.0, 99.9])
async def test_requests_do_not_notice_that_the_new_version_is_not_there(percent: float) -> None:
    old = FakeVersion("old")
    split = SplitBackend(old)
    split.split(AbsentVersion("new"), percent)
    for number in range(20):
        assert await split.models() == [old.card]
        assert await split.capabilities("m") == old.able
        prompt = await split.prepare("m", PrepareRequest(f"r{number}", text="Go"))
        assert prompt.token_ids == tuple(b"old")
        assert await answer(split, f"r{number}") == "old"
    stats = split.stats["canary"]
    assert stats.num_failed == stats.num_requests
    assert (stats.num_failed > 0) == (percent > 0)


async def test_a_new_version_that_hangs_holds_nobody_up() -> None:
    class Hanging(FakeVersion):
        async def models(self) -> list[ModelCard]:
            await asyncio.Event().wait()
            raise AssertionError

    old = FakeVersion("old")
    split = SplitBackend(old)
    split.split(Hanging("new"), 0.0)
    async with asyncio.timeout(1):
        assert await split.models() == [old.card]
    split.split(FakeVersion("newer", "other"), 0.0)
    assert [card.id for card in await split.models()] == ["m", "other"]


async def test_all_calls_of_a_request_meet_the_same_version() -> None:
    split = SplitBackend(FakeVersion("old"))
    split.split(FakeVersion("new"), 50.0)
    seen = set()
    for i in range(40):
        prepared = await split.prepare("m", PrepareRequest(f"k{i}", text="x"))
        version = bytes(prepared.token_ids).decode()
        assert await answer(split, f"k{i}") == version
        seen.add(version)
    assert seen == {"old", "new"}


async def test_a_share_that_changes_between_prompt_and_answer_does_not_tear_a_request() -> None:
    split = SplitBackend(FakeVersion("old"))
    new = FakeVersion("new")
    split.split(new, 100.0)
    await split.prepare("m", PrepareRequest("k", text="x"))
    split.split(new, 0.0)

    assert await answer(split, "k") == "new"
    assert await answer(split, "another") == "old"


async def test_without_a_canary_the_stable_generator_goes_through_untouched() -> None:
    split = SplitBackend(FakeVersion("old"))
    assert await answer(split, "k") == "old"
    assert split.stats == {}
    assert [card.id for card in await split.models()] == ["m"]


async def test_a_new_name_reaches_the_new_version_at_any_share() -> None:
    split = SplitBackend(FakeVersion("old"))
    split.split(FakeVersion("new", "m2"), 0.0)

    assert [(card.id, card.aliases) for card in await split.models()] == [
        ("m", ("*",)),
        ("m2", ()),
    ]
    assert await answer(split, "k", "m2") == "new"
    assert await answer(split, "k", "m") == "old"


async def test_limits_are_those_that_both_versions_keep() -> None:
    new = FakeVersion("new", logprobs=False)
    new.card = replace(new.card, max_model_len=1000)
    split = SplitBackend(FakeVersion("old"))
    split.split(new, 10.0)

    assert (await split.models())[0].max_model_len == 1000
    assert not (await split.capabilities("m")).logprobs
    assert (await split.health()).status == "old"
    split.split(new, 100.0)
    assert (await split.health()).status == "new"


@pytest.mark.parametrize(
    ("error", "num_failed"),
    [(EngineError("x"), 1), (OverloadedError("x"), 1), (ClientError("x"), 0)],
)
async def test_failures_are_the_services_own(error: Exception, num_failed: int) -> None:
    new = FakeVersion("new")
    new.error = error
    split = SplitBackend(FakeVersion("old"))
    split.split(new, 100.0)

    with pytest.raises(type(error)):
        await answer(split, "k")

    stats = split.stats["canary"]
    assert (stats.num_requests, stats.num_failed) == (1, num_failed)
    assert split.num_open(new) == 0  # type: ignore[arg-type]


async def test_times_and_tokens_are_counted_for_each_version() -> None:
    now = iter(range(100))
    new = FakeVersion("new")
    split = SplitBackend(FakeVersion("old"), now=lambda: float(next(now)))
    split.split(new, 100.0)
    await answer(split, "k")

    stats = split.stats["canary"]
    assert (list(stats.ttfts_s), list(stats.latencies_s), stats.num_tokens) == ([1.0], [2.0], 3)
    assert split.stats["stable"].num_requests == 0


def test_a_canary_that_does_not_run_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str, app_name: str) -> None:
        raise KeyError(f"{name} of {app_name} does not exist.")

    monkeypatch.setattr(canary_backend_module.serve, "get_deployment_handle", missing)
    section = CanarySection(application="app-next", percent=5.0)
    with pytest.raises(ConfigError, match=r"canary\.application: app-next does not run"):
        canary_backend_module.canary_backend(section)
