"""The token relay over real sockets, without Ray: a scripted engine, a byte-sized processor."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.config.model_source import resolve_model
from serve_app.config.schema import AppConfig
from serve_app.core.errors import EngineError, ErrorInfo
from serve_app.core.events import FinishReason, TokenEvent
from serve_app.core.requests import GenerateChunk, GenerateRequest, LogprobItem
from serve_app.core.sampling import SamplingParams
from serve_app.deployments import relay_sender
from serve_app.deployments.relay_receiver import Inbox, RelayReceiver
from serve_app.deployments.relay_sender import RelayedSequence, RelayLink, RelaySender
from serve_app.deployments.relay_wire import pack_chunk, unpack_chunk
from serve_app.engine.token_stream import TokenStream
from serve_app.engine.wire import FrameReader, pack_frame
from serve_app.text.output import OutputProcessor
from serve_app.text.tokenizer import Tokenizer, load_tokenizer

LOGPROBS = st.builds(
    LogprobItem,
    st.text(max_size=3),
    st.floats(allow_nan=False),
    st.tuples(st.integers(0, 255)),
    st.just((("a", -1.0, (97,)),)),
)
CHUNKS = st.builds(
    GenerateChunk,
    text=st.text(max_size=8),
    token_ids=st.lists(st.integers(0, 1 << 20), max_size=4).map(tuple),
    logprobs=st.none() | st.lists(LOGPROBS, max_size=2).map(tuple),
    finish_reason=st.none() | st.sampled_from(["stop", "length"]),
    stop_reason=st.none() | st.text(max_size=3) | st.integers(0, 9),
    num_prompt=st.integers(0, 99),
    num_generated=st.integers(0, 99),
    num_cached=st.integers(0, 99),
    error=st.none() | st.just(ErrorInfo(500, "server_error", "engine_error", "it died")),
)


@given(st.integers(1, 1 << 40), CHUNKS)
def test_a_chunk_arrives_as_it_was(key: int, chunk: GenerateChunk) -> None:
    if chunk.finish_reason is None:  # only the last chunk has a reason to have stopped
        chunk = GenerateChunk(
            chunk.text, chunk.token_ids, chunk.logprobs, num_generated=5, error=chunk.error
        )
    (frame,) = FrameReader().feed(pack_frame("chunks", [pack_chunk(key, chunk)]))
    ((values,),) = frame[1:]

    assert values[0] == key
    assert unpack_chunk(values) == chunk


class Replica:
    """A sender whose engine is the test: `streams` take events, `aborted` tells of ended ones."""

    def __init__(self, tokenizer: Tokenizer, interval_s: float) -> None:
        self.tokenizer = tokenizer
        self.sender = RelaySender(lambda: interval_s)
        self.streams: list[TokenStream] = []
        self.aborted: list[str] = []

    async def begin(self, inbox: Inbox, **changes: Any) -> RelayedSequence:
        """Relay a new sequence to the inbox."""
        link = await self.sender.link_to(inbox.target)
        assert link is not None
        name = str(len(self.streams))
        stream = TokenStream(name, self.aborted.append)
        request = GenerateRequest(name, (1,), SamplingParams(), **changes)
        self.streams.append(stream)
        processor = OutputProcessor(self.tokenizer, request)
        return self.sender.add(link, inbox.target.key, stream, processor)

    def step(self, *texts: str, last: FinishReason | None = None) -> None:
        """Give each live stream the tokens of its text, as one step of an engine does."""
        for stream, text in zip(self.streams, texts, strict=True):
            ids = tuple(self.tokenizer.encode(text, add_special_tokens=False))
            stream.put(TokenEvent(stream.request_id, ids, finish_reason=last))


class Reader:
    """Collects what an inbox hands on."""

    def __init__(self, inbox: Inbox) -> None:
        self.chunks: list[GenerateChunk] = []
        self.came = asyncio.Event()
        inbox.open(self._take)

    def _take(self, chunk: GenerateChunk) -> None:
        self.chunks.append(chunk)
        self.came.set()

    @property
    def text(self) -> str:
        return "".join(chunk.text for chunk in self.chunks)

    async def until(self, count: int) -> None:
        """Wait until so many chunks have come."""
        async with asyncio.timeout(10):
            while len(self.chunks) < count:
                self.came.clear()
                await self.came.wait()


async def settle() -> None:
    """Let asyncio close what was closed: it does so in a later round of the loop."""
    for _ in range(5):
        await asyncio.sleep(0)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(resolve_model(AppConfig().model))


@pytest.fixture
async def receiver() -> AsyncIterator[RelayReceiver]:
    made = RelayReceiver()
    await made.start("127.0.0.1")
    yield made
    made.close()
    await settle()


def open_inbox(receiver: RelayReceiver) -> tuple[Inbox, Reader]:
    inbox = receiver.add()
    assert inbox is not None
    return inbox, Reader(inbox)


async def test_one_connection_carries_all_requests_of_an_ingress(
    receiver: RelayReceiver, tokenizer: Tokenizer
) -> None:
    replica = Replica(tokenizer, 0.0)
    pairs = [open_inbox(receiver) for _ in range(3)]
    sequences = [await replica.begin(inbox) for inbox, _ in pairs]

    replica.step("one", "two", "three")
    replica.step(" a", " b", " c", last=FinishReason.LENGTH)

    for sequence in sequences:
        assert await asyncio.wait_for(sequence.ended, 10) is None
    for _, reader in pairs:
        await reader.until(1)
        while reader.chunks[-1].finish_reason is None:
            await reader.until(len(reader.chunks) + 1)
    assert [reader.text for _, reader in pairs] == ["one a", "two b", "three c"]
    assert len({sequence.link for sequence in sequences}) == 1
    replica.sender.close()


async def test_the_end_does_not_wait_for_the_interval(
    receiver: RelayReceiver, tokenizer: Tokenizer
) -> None:
    replica = Replica(tokenizer, 3600.0)
    (first, quick), (second, slow) = open_inbox(receiver), open_inbox(receiver)
    for inbox in (first, second):
        await replica.begin(inbox)
    replica.step("x", "y")
    for reader in (quick, slow):
        await reader.until(1)
    replica.step("x", "y")
    replica.streams[0].put(TokenEvent("0", (), finish_reason=FinishReason.LENGTH))

    await quick.until(2)

    assert (quick.text, quick.chunks[-1].finish_reason) == ("xx", "length")
    assert slow.text == "y", "an interval has not passed for the other"
    replica.sender.close()


async def test_a_stop_string_ends_the_sequence_in_the_engine(
    receiver: RelayReceiver, tokenizer: Tokenizer
) -> None:
    replica = Replica(tokenizer, 0.0)
    inbox, reader = open_inbox(receiver)
    sequence = await replica.begin(inbox, stop=("END",))

    replica.step("before END after")

    assert await asyncio.wait_for(sequence.ended, 10) is None
    await reader.until(1)
    assert (reader.text, reader.chunks[-1].stop_reason) == ("before ", "END")
    assert replica.aborted == ["0"]
    assert inbox.is_finished
    replica.sender.close()


async def test_chunks_wait_until_the_request_is_ready_for_them(
    receiver: RelayReceiver, tokenizer: Tokenizer
) -> None:
    replica = Replica(tokenizer, 0.0)
    inbox = receiver.add()
    assert inbox is not None
    await replica.begin(inbox)
    replica.step("early", last=FinishReason.LENGTH)

    await inbox.wait(asyncio.get_running_loop().create_future(), 10)

    reader = Reader(inbox)
    assert (reader.text, inbox.is_finished) == ("early", True)
    replica.sender.close()


async def test_an_ingress_that_goes_ends_its_requests_with_an_error(
    receiver: RelayReceiver, tokenizer: Tokenizer
) -> None:
    replica = Replica(tokenizer, 0.0)
    inbox, _ = open_inbox(receiver)
    sequence = await replica.begin(inbox)

    receiver.close()

    error = await asyncio.wait_for(sequence.ended, 10)
    assert error is not None
    assert (error.status, replica.sender.num_lost) == (500, 1)
    replica.step("nobody")  # harms nobody
    replica.sender.close()


async def test_an_ingress_that_takes_nothing_is_cut_off_and_delays_no_step(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay_sender, "MAX_BUFFER_BYTES", 1 << 16)
    is_connected, may_end, has_ended = (asyncio.Event() for _ in range(3))

    async def stall(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        is_connected.set()
        await may_end.wait()
        writer.close()
        has_ended.set()

    server = await asyncio.start_server(stall, "127.0.0.1", 0, limit=1024)
    host, port = server.sockets[0].getsockname()[:2]
    receiver = RelayReceiver()
    receiver._address = (host, port)
    inbox = receiver.add()
    assert inbox is not None
    replica = Replica(tokenizer, 0.0)
    sequence = await replica.begin(inbox)
    await is_connected.wait()

    for _ in range(3000):
        replica.step("a rather long piece of text that nobody ever takes away " * 20)
        await asyncio.sleep(0)
        if sequence.ended.done():
            break

    error = sequence.ended.result()
    assert error is not None
    assert "did not take" in error.message
    assert replica.sender.num_lost == 1
    may_end.set()
    await has_ended.wait()
    server.close()
    await server.wait_closed()
    replica.sender.close()
    await settle()


async def test_a_wrong_token_is_refused(receiver: RelayReceiver) -> None:
    inbox, reader = open_inbox(receiver)
    target = inbox.target
    for hello in (pack_frame("hello", 1, "guess"), pack_frame("chunks", []), b"x" * 4096):
        stream_reader, writer = await asyncio.open_connection(target.host, target.port)
        writer.write(hello + pack_frame("chunks", [pack_chunk(target.key, GenerateChunk("in"))]))
        async with asyncio.timeout(10):
            with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                await stream_reader.readexactly(1)
        writer.close()

    assert reader.chunks == []


async def test_where_nobody_listens_there_is_no_link(receiver: RelayReceiver) -> None:
    inbox, _ = open_inbox(receiver)
    receiver.close()
    sender = RelaySender(lambda: 0.0)

    assert await sender.link_to(inbox.target) is None
    assert receiver.add() is None, "and the ingress offers none"
    sender.close()


async def test_a_link_lost_before_a_sequence_joins_it_tells_at_once(
    receiver: RelayReceiver, tokenizer: Tokenizer
) -> None:
    replica = Replica(tokenizer, 0.0)
    inbox, _ = open_inbox(receiver)
    link = await replica.sender.link_to(inbox.target)
    assert isinstance(link, RelayLink)
    link._lose("gone")

    stream = TokenStream("r", replica.aborted.append)
    request = GenerateRequest("r", (1,), SamplingParams())
    sequence = replica.sender.add(
        link, inbox.target.key, stream, OutputProcessor(tokenizer, request)
    )

    assert sequence.ended.result() is not None
    assert sequence.ended.result() != EngineError("gone").info()
    replica.sender.close()


def test_it_runs_on_the_loop_that_ray_serve_uses(tokenizer: Tokenizer) -> None:
    uvloop = pytest.importorskip("uvloop")

    async def relay_one() -> str:
        receiver = RelayReceiver()
        await receiver.start("127.0.0.1")
        replica = Replica(tokenizer, 0.0)
        inbox, reader = open_inbox(receiver)
        await replica.begin(inbox)
        replica.step("as ever", last=FinishReason.LENGTH)
        await reader.until(1)
        replica.sender.close()
        receiver.close()
        await asyncio.sleep(0.01)
        return reader.text

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(relay_one()) == "as ever"
