"""The HTTP surface over a scripted backend, in-process."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.applications import Starlette

from serve_app.api.app import create_app
from serve_app.config.schema import AppConfig
from serve_app.core.errors import ErrorInfo
from serve_app.core.events import EngineCapabilities
from serve_app.core.requests import (
    GenerateChunk,
    GenerateRequest,
    ModelCard,
    PreparedPrompt,
    PrepareRequest,
    ReplicaHealth,
    ServiceHealth,
)
from serve_app.observability.activity import ActivityReport

VOCAB_SIZE = 300
CARD = ModelCard(
    id="org/tiny",
    aliases=("tiny", "gpt-4o"),
    max_model_len=64,
    vocab_size=VOCAB_SIZE,
    created=1_700_000_000,
    root="tiny",
    eos_token_ids=(299,),
)

Step = GenerateChunk | Exception | asyncio.Event | Future[None]


def chunks(*texts: str, finish: str = "stop", **last: Any) -> list[GenerateChunk]:
    """One token a text; the finish reason comes alone at the end."""
    made = [
        GenerateChunk(text=text, token_ids=(place,), num_prompt=5, num_generated=place + 1)
        for place, text in enumerate(texts)
    ]
    end = GenerateChunk(finish_reason=finish, num_prompt=5, num_generated=len(texts))
    return [*made, replace(end, **last)]


@dataclass
class FakeBackend:
    """Plays a script for each sequence: chunks are sent, errors raised, events waited for.

    A Future is an event that any thread may set.
    """

    cards: list[ModelCard] = field(default_factory=lambda: [CARD])
    engine: EngineCapabilities = field(default_factory=EngineCapabilities)
    script: Sequence[Step] = field(default_factory=lambda: chunks("Hel", "lo"))
    scripts: list[Sequence[Step]] = field(default_factory=list)
    state: ServiceHealth = field(
        default_factory=lambda: ServiceHealth(
            True, "ready", (ReplicaHealth("replica-0", "ready", device="cpu"),)
        )
    )
    failure: Exception | None = None
    prepare_delay: asyncio.Event | None = None
    starts_in_reasoning: bool = False
    grammar: str = ""
    prepare_error: ErrorInfo | None = None
    replica_metrics: str = ""
    reports: list[ActivityReport] = field(default_factory=list)
    requests: list[GenerateRequest] = field(default_factory=list)
    prepared: list[PrepareRequest] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)
    is_draining: bool = False
    profiles: list[tuple[int, float]] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    reloaded: list[str] = field(default_factory=list)
    started: asyncio.Event = field(default_factory=asyncio.Event)
    all_closed: asyncio.Event = field(default_factory=asyncio.Event)

    async def models(self) -> list[ModelCard]:
        return self.cards

    async def reload(self, model_id: str) -> list[str]:
        self.reloaded.append(model_id)
        return [replica.replica_id for replica in self.state.replicas]

    async def capabilities(self, model_id: str) -> EngineCapabilities:
        if self.failure is not None:
            raise self.failure
        return self.engine

    async def prepare(self, model_id: str, request: PrepareRequest) -> PreparedPrompt:
        self.prepared.append(request)
        if self.prepare_delay is not None:
            await self.prepare_delay.wait()
        if self.prepare_error is not None:
            return PreparedPrompt(error=self.prepare_error)
        text = request.text
        if request.messages is not None:
            text = "".join(message["content"] for message in request.messages)
        return PreparedPrompt(
            tuple((text or "").encode()), self.starts_in_reasoning, grammar=self.grammar
        )

    async def detokenize(self, model_id: str, token_ids: tuple[int, ...]) -> str:
        return bytes(token_ids).decode()

    async def token_strings(self, model_id: str, token_ids: tuple[int, ...]) -> list[str]:
        return [chr(token_id) for token_id in token_ids]

    async def generate(
        self, model_id: str, request: GenerateRequest
    ) -> AsyncGenerator[GenerateChunk, None]:
        self.requests.append(request)
        script = self.scripts.pop(0) if self.scripts else self.script
        self.started.set()
        try:
            for step in script:
                if isinstance(step, asyncio.Event):
                    await step.wait()
                elif isinstance(step, Future):
                    await asyncio.wrap_future(step)
                elif isinstance(step, Exception):
                    raise step
                else:
                    yield step
        finally:
            self.closed.append(request.request_id)
            if len(self.closed) == len(self.requests):
                self.all_closed.set()

    async def health(self) -> ServiceHealth:
        if self.failure is not None:
            raise self.failure
        return self.state

    async def metrics_text(self) -> str:
        if self.failure is not None:
            raise self.failure
        return self.replica_metrics

    async def activity(self) -> list[ActivityReport]:
        return self.reports

    async def profile(self, num_steps: int, timeout_s: float) -> dict[str, Any]:
        self.profiles.append((num_steps, timeout_s))
        if self.failure is not None:
            raise self.failure
        return self.figures

    async def drain(self) -> None:
        self.is_draining = True


@dataclass
class Exchange:
    """One request driven by hand: the client speaks through `inbox`, answers land in `sent`."""

    app: Starlette
    path: str
    body: Any
    headers: dict[str, str] = field(default_factory=dict)
    sent: list[dict[str, Any]] = field(default_factory=list)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.inbox: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        body = self.body if isinstance(self.body, bytes) else json.dumps(self.body).encode()
        self.inbox.put_nowait({"type": "http.request", "body": body, "more_body": False})

    def disconnect(self) -> None:
        self.inbox.put_nowait({"type": "http.disconnect"})

    async def send(self, message: dict[str, Any]) -> None:
        self.sent.append(message)
        self.arrived.set()

    async def wait_for(self, needle: bytes) -> None:
        while needle not in self.text:
            self.arrived.clear()
            await asyncio.wait_for(self.arrived.wait(), 5)

    @property
    def text(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)

    async def run(self) -> None:
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "method": "POST",
            "path": self.path,
            "raw_path": self.path.encode(),
            "root_path": "",
            "scheme": "http",
            "query_string": b"",
            "headers": [(k.lower().encode(), v.encode()) for k, v in self.headers.items()],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
        }
        await self.app(scope, self.inbox.get, self.send)


MakeClient = Callable[..., httpx.AsyncClient]


@pytest.fixture
def fakes() -> dict[str, Any]:
    """The names that tests of the API use, since test folders are no packages."""
    return {"chunks": chunks, "Exchange": Exchange, "CARD": CARD, "VOCAB_SIZE": VOCAB_SIZE}


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
def make_app(backend: FakeBackend) -> Callable[..., Starlette]:
    """A function from ingress settings (and whole sections by name) to the application."""

    def make(model: dict[str, Any] | None = None, **ingress: Any) -> Starlette:
        sections = {"ingress": ingress, "model": {"name": "org/tiny", **(model or {})}}
        return create_app(backend, AppConfig.model_validate(sections))

    return make


@pytest.fixture
async def make_client(
    make_app: Callable[..., Starlette],
) -> AsyncIterator[MakeClient]:
    """A function from settings to a client; `app=` takes an application, `peer=` an address."""
    opened: list[httpx.AsyncClient] = []

    def make(
        app: Starlette | None = None, peer: str = "127.0.0.1", **settings: Any
    ) -> httpx.AsyncClient:
        transport = httpx.ASGITransport(app=app or make_app(**settings), client=(peer, 1234))
        client = httpx.AsyncClient(transport=transport, base_url="http://localhost")
        opened.append(client)
        return client

    yield make
    for client in opened:
        await client.aclose()


@pytest.fixture
def client(make_client: MakeClient) -> httpx.AsyncClient:
    """A client of the application with default settings."""
    return make_client()


@pytest.fixture
def run_server(free_port: int) -> Iterator[Callable[[Starlette], str]]:
    """A function that serves an application with uvicorn on loopback; returns its URL."""
    stops: list[Callable[[], None]] = []

    def run(app: Starlette) -> str:
        config = uvicorn.Config(
            app, "127.0.0.1", free_port, log_config=None, ws="none", timeout_graceful_shutdown=1
        )
        server = uvicorn.Server(config)
        listener = config.bind_socket()
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()

        def stop() -> None:
            server.should_exit = True
            thread.join(10)
            listener.close()

        stops.append(stop)
        return f"http://127.0.0.1:{free_port}"

    yield run
    for stop in stops:
        stop()
