"""Streams that go on at another replica: over scripted replicas with the real detokenizer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.api.feed import Feed
from serve_app.config.model_source import resolve_model
from serve_app.config.schema import AppConfig
from serve_app.core.errors import ContextLengthError, EngineError, OverloadedError, XeRayError
from serve_app.core.events import FinishReason, TokenEvent, TokenLogprob
from serve_app.core.requests import GenerateChunk, GenerateRequest
from serve_app.core.sampling import SamplingParams
from serve_app.deployments import continuation
from serve_app.deployments.continuation import (
    MAX_MOVES,
    ContinuationPolicy,
    ContinuedGeneration,
)
from serve_app.deployments.continuation_input import end_of, engine_input
from serve_app.text.output import OutputProcessor
from serve_app.text.tokenizer import Tokenizer, load_tokenizer

LOST = EngineError("the model replica that worked on this request died")
MAX_MODEL_LEN = 4096
ANSWER = "Zwölf Öfen 🚀 heizen STO und STOP danach; naïve 東京 emoji 👩‍🔬 ends here."


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return load_tokenizer(resolve_model(AppConfig().model))


@dataclass
class Replicas:
    """Replicas that all would give the same ids; each call is cut after its part of `cuts`.

    A cut is a number of engine events; an exception in its place is raised before the first one.
    """

    tokenizer: Tokenizer
    answer: tuple[int, ...]
    cuts: list[int | Exception] = field(default_factory=list)
    ids_per_event: int = 1
    eos: int = 2
    loss: Callable[[], GenerateChunk] | None = None
    requests: list[GenerateRequest] = field(default_factory=list)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[GenerateChunk, None]:
        self.requests.append(request)
        cut = self.cuts.pop(0) if self.cuts else None
        if isinstance(cut, Exception):
            raise cut
        processor = OutputProcessor(self.tokenizer, request)
        end = end_of(request, MAX_MODEL_LEN)
        for number, event in enumerate([end] if end else self.events(request)):
            if number == cut:
                if self.loss is not None:
                    yield self.loss()
                    return
                raise LOST
            chunk = processor.push([event])
            if chunk is not None:
                await asyncio.sleep(0)
                yield chunk
            if processor.is_finished:
                return

    def events(self, request: GenerateRequest) -> list[TokenEvent]:
        """What an engine gives: it sees nothing but its own input."""
        ids, sampling = engine_input(request)
        place = len(ids) - len(request.prompt_token_ids)
        assert ids[len(ids) - place :] == self.answer[:place]
        rest = self.answer[place : place + sampling.max_tokens]
        made = []
        for start in range(0, len(rest), self.ids_per_event):
            new = rest[start : start + self.ids_per_event]
            logprobs = tuple(TokenLogprob(i, -i / 1e5, ((i, -i / 1e5),)) for i in new)
            made.append(
                TokenEvent(
                    request.request_id,
                    new,
                    logprobs=logprobs if sampling.logprobs is not None else None,
                    num_cached_tokens=len(ids),
                )
            )
        is_stop = self.eos in rest
        made[-1] = replace(
            made[-1],
            finish_reason=FinishReason.STOP if is_stop else FinishReason.LENGTH,
            stop_token_id=self.eos if is_stop else None,
        )
        return made


def wanted(**changes: Any) -> GenerateRequest:
    sampling = SamplingParams(
        temperature=changes.pop("temperature", 0.0),
        max_tokens=changes.pop("max_tokens", 500),
        stop_token_ids=(2,),
        logprobs=changes.pop("logprobs", None),
        seed=changes.pop("seed", None),
    )
    return GenerateRequest("r", (5, 6, 7), sampling, **changes)


def answer_ids(tokenizer: Tokenizer, text: str = ANSWER) -> tuple[int, ...]:
    return (*tokenizer.encode(text, add_special_tokens=False), 2)


def generation(
    replicas: Replicas, request: GenerateRequest, policy: ContinuationPolicy | None = None
) -> ContinuedGeneration:
    return ContinuedGeneration(replicas.generate, request, policy or ContinuationPolicy())


async def run(generator: Any) -> list[GenerateChunk]:
    return [chunk async for chunk in generator]


def told(chunks: Sequence[GenerateChunk]) -> tuple[Any, ...]:
    """Everything a client may see of a sequence."""
    last = chunks[-1]
    return (
        "".join(chunk.text for chunk in chunks),
        [i for chunk in chunks for i in chunk.token_ids],
        [item for chunk in chunks for item in chunk.logprobs or ()],
        (last.finish_reason, last.stop_reason, last.num_prompt, last.num_generated),
        max(chunk.num_cached for chunk in chunks),
    )


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(continuation, "_RETRY_S", 0.0)


@given(
    cuts=st.lists(st.integers(1, 12), max_size=MAX_MOVES),
    ids_per_event=st.integers(1, 4),
    stop=st.sampled_from([(), ("STOP",), ("OP da",), ("emoji 👩‍🔬",), ("never",)]),
    include_stop=st.booleans(),
    max_tokens=st.sampled_from([7, 500]),
)
def test_whatever_the_cuts_a_client_sees_the_same(
    tokenizer: Tokenizer,
    cuts: list[int | Exception],
    ids_per_event: int,
    stop: tuple[str, ...],
    include_stop: bool,
    max_tokens: int,
) -> None:
    answer = answer_ids(tokenizer)
    request = wanted(
        stop=stop, include_stop_str_in_output=include_stop, logprobs=1, max_tokens=max_tokens
    )
    whole = asyncio.run(run(generation(Replicas(tokenizer, answer), request)))
    replicas = Replicas(tokenizer, answer, list(cuts), ids_per_event)

    chunks = asyncio.run(run(generation(replicas, request)))

    assert told(chunks)[:4] == told(whole)[:4]
    assert told(chunks)[4] == len(request.prompt_token_ids), "cached: as the first replica told"


@given(st.integers(0, 40))
def test_a_chunk_that_tells_of_the_loss_is_as_good_as_an_error(
    tokenizer: Tokenizer, cut: int
) -> None:
    answer = answer_ids(tokenizer)
    whole = asyncio.run(run(generation(Replicas(tokenizer, answer), wanted())))
    replicas = Replicas(
        tokenizer,
        answer,
        [cut + 1],
        loss=lambda: GenerateChunk("held", (77,), error=LOST.info()),
    )

    chunks = asyncio.run(run(generation(replicas, wanted())))

    assert told(chunks) == told(whole), "its text and ids are the next replica's to tell"


async def test_it_goes_on_through_a_feed_that_is_pushed_to(tokenizer: Tokenizer) -> None:
    answer = answer_ids(tokenizer)
    whole = told(await run(generation(Replicas(tokenizer, answer), wanted())))
    replicas = [Replicas(tokenizer, answer, [cut, 5]) for cut in (3, 9)]  # n = 2
    num_continued = 0

    def count() -> None:
        nonlocal num_continued
        num_continued += 1

    generators = [
        ContinuedGeneration(
            lambda request, r=r: Pushing(r, request),  # type: ignore[misc]
            wanted(),
            ContinuationPolicy(),
            count,
        )
        for r in replicas
    ]
    seen: list[list[GenerateChunk]] = [[], []]
    async with asyncio.timeout(10), Feed(generators, never) as feed:
        while (items := await feed.next()) is not None:
            for index, chunk in items:
                seen[index].append(chunk)

    assert [told(chunks) for chunks in seen] == [whole, whole]
    assert num_continued == 4


class Pushing(AsyncGenerator[GenerateChunk, None]):
    """A call whose first chunk is yielded, all others are pushed, as RayGeneration does."""

    def __init__(self, replicas: Replicas, request: GenerateRequest) -> None:
        self._source = replicas.generate(request)
        self._sink: Callable[[GenerateChunk], None] = lambda chunk: None
        self._chunks = self._run()

    def push_to(self, sink: Callable[[GenerateChunk], None]) -> None:
        self._sink = sink

    async def _run(self) -> AsyncGenerator[GenerateChunk, None]:
        yield await anext(self._source)
        try:
            async for chunk in self._source:
                self._sink(chunk)
        except XeRayError as error:
            self._sink(GenerateChunk(error=error.info()))

    async def asend(self, value: None) -> GenerateChunk:
        return await self._chunks.asend(value)

    async def athrow(self, *error: Any) -> GenerateChunk:
        return await self._chunks.athrow(*error)

    async def aclose(self) -> None:
        await self._chunks.aclose()
        await self._source.aclose()


async def never() -> dict[str, str]:
    await asyncio.Event().wait()
    return {}


@pytest.mark.parametrize("seed", [None, 7])
@pytest.mark.parametrize("streams", ["off", "deterministic", "all"])
async def test_the_policy_says_which_streams_go_on(
    tokenizer: Tokenizer, seed: int | None, streams: Any
) -> None:
    replicas = Replicas(tokenizer, answer_ids(tokenizer), [3])
    running = run(
        generation(replicas, wanted(temperature=1.0, seed=seed), ContinuationPolicy(streams))
    )

    if streams == "all" or (streams == "deterministic" and seed is not None):
        assert (await running)[-1].finish_reason == "stop"
    else:
        with pytest.raises(EngineError, match="died"):
            await running
        assert len(replicas.requests) == 1


async def test_no_token_yet_is_not_its_affair(tokenizer: Tokenizer) -> None:
    replicas = Replicas(tokenizer, answer_ids(tokenizer), [0])

    with pytest.raises(EngineError, match="died"):
        await run(generation(replicas, wanted()))

    assert len(replicas.requests) == 1, "the backend has tried others already"


async def test_it_waits_for_a_replica_as_long_as_it_may(tokenizer: Tokenizer) -> None:
    busy = OverloadedError("no model replica is up", code="no_replica")
    answer = answer_ids(tokenizer)

    replicas = Replicas(tokenizer, answer, [3, busy, busy, busy])
    assert (await run(generation(replicas, wanted())))[-1].finish_reason == "stop"
    assert len(replicas.requests) == 5
    assert len({request.request_id for request in replicas.requests}) == 5

    replicas = Replicas(tokenizer, answer, [3, busy])
    with pytest.raises(EngineError, match="died"):  # what cut it off, not what came after
        await run(generation(replicas, wanted(), ContinuationPolicy(patience_s=0.0)))


async def test_a_request_that_kills_its_replicas_is_stopped(tokenizer: Tokenizer) -> None:
    replicas = Replicas(tokenizer, answer_ids(tokenizer), [1] * 10)

    with pytest.raises(EngineError, match="died"):
        await run(generation(replicas, wanted()))

    assert len(replicas.requests) == MAX_MOVES + 1


async def test_a_refusal_of_the_rest_tells_of_the_loss(tokenizer: Tokenizer) -> None:
    replicas = Replicas(tokenizer, answer_ids(tokenizer), [3, ContextLengthError("too long")])

    with pytest.raises(EngineError, match="died"):
        await run(generation(replicas, wanted()))


async def test_closing_it_closes_the_call(tokenizer: Tokenizer) -> None:
    closed = []

    async def endless(request: GenerateRequest) -> AsyncGenerator[GenerateChunk, None]:
        try:
            while True:
                yield GenerateChunk("x", (1,))
        finally:
            closed.append(request.request_id)

    generator = ContinuedGeneration(endless, wanted(), ContinuationPolicy())
    await anext(generator)
    await generator.aclose()

    assert closed == ["r"]


@pytest.mark.parametrize(
    ("generated", "reason"),
    [((9, 2), "stop"), ((9,) * 10, "length"), ((9, 9), None), ((), None)],
)
def test_an_answer_that_was_complete_ends_without_the_engine(
    generated: tuple[int, ...], reason: str | None
) -> None:
    event = end_of(wanted(max_tokens=10, generated_token_ids=generated), 100)

    assert (event.finish_reason if event else None) == reason


def test_the_engine_gets_the_rest_of_the_limits() -> None:
    sampling = SamplingParams(
        max_tokens=10, min_tokens=5, prompt_logprobs=1, frequency_penalty=0.5, seed=3
    )
    request = GenerateRequest("r", (1, 2), sampling, generated_token_ids=(7, 8, 9))

    ids, rest = engine_input(request)

    assert ids == (1, 2, 7, 8, 9)
    assert (rest.max_tokens, rest.min_tokens, rest.prompt_logprobs) == (7, 2, None)
    assert (rest.num_prior_tokens, rest.seed) == (3, 3)
    assert engine_input(replace(request, generated_token_ids=())) == ((1, 2), sampling)
