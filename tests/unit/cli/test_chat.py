from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from serve_app.cli import chat
from serve_app.cli.chat_client import ChatClient, connect
from serve_app.cli.main import main


class Terminal(io.StringIO):
    """Output that says it is a terminal."""

    def isatty(self) -> bool:
        return True


class FakeServer:
    """Answers every request with the scripted events, and keeps the bodies it got."""

    def __init__(self, *events: dict[str, Any]) -> None:
        self.events = events
        self.bodies: list[dict[str, Any]] = []
        self.is_closed_early = False
        self.interrupt_after: int | None = None
        self.refuse_prompt: str | None = None

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "m"}]})
        self.bodies.append(json.loads(request.content))
        if self.bodies[-1]["messages"][-1]["content"] == self.refuse_prompt:
            return httpx.Response(400, json={"error": {"message": "refused"}})
        return httpx.Response(200, stream=_Stream(self))

    def conversation(self, system: str | None = None) -> chat.Conversation:
        http = connect("http://server", None, transport=httpx.MockTransport(self))
        return chat.Conversation(ChatClient(http, "m"), system=system)


class _Stream(httpx.SyncByteStream):
    def __init__(self, server: FakeServer) -> None:
        self.server = server

    def __iter__(self) -> Iterator[bytes]:
        for position, event in enumerate(self.server.events):
            if position == self.server.interrupt_after:
                raise KeyboardInterrupt
            yield f"data: {json.dumps(event)}\n\n".encode()
        yield b"data: [DONE]\n\n"

    def close(self) -> None:
        self.server.is_closed_early = self.server.interrupt_after is not None


def delta(**fields: str) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": fields, "finish_reason": None}]}


PARIS = (delta(content="Par"), delta(content="is"))
THINKING = (delta(reasoning_content="hm"), delta(content="Paris"))


def screen(**changes: Any) -> chat.Screen:
    return chat.Screen(**{"out": io.StringIO(), "err": io.StringIO(), **changes})


def test_the_conversation_grows_by_both_sides() -> None:
    server = FakeServer(*PARIS)
    conversation = server.conversation(system="Be brief.")

    chat.answer(conversation, "France?", screen())
    chat.answer(conversation, "And?", screen())

    assert server.bodies[1]["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "France?"},
        {"role": "assistant", "content": "Paris"},
        {"role": "user", "content": "And?"},
    ]


def test_an_answer_is_written_as_it_comes() -> None:
    out = io.StringIO()
    chat.answer(FakeServer(*PARIS).conversation(), "France?", screen(out=out))

    assert out.getvalue() == "Paris\n"


def test_reasoning_is_dimmed_on_a_terminal() -> None:
    out = Terminal()
    chat.answer(FakeServer(*THINKING).conversation(), "France?", screen(out=out))

    assert out.getvalue() == f"{chat.DIM}hm{chat.RESET}\n\nParis\n"


def test_reasoning_stays_out_of_a_pipe() -> None:
    out, err = io.StringIO(), io.StringIO()
    chat.answer(FakeServer(*THINKING).conversation(), "France?", screen(out=out, err=err))

    assert (out.getvalue(), err.getvalue()) == ("Paris\n", "hm")


def test_dimming_ends_when_only_reasoning_came() -> None:
    out = Terminal()
    chat.answer(FakeServer(THINKING[0]).conversation(), "France?", screen(out=out))

    assert out.getvalue() == f"{chat.DIM}hm{chat.RESET}\n"


def test_ctrl_c_ends_the_answer_and_keeps_what_came() -> None:
    server = FakeServer(*PARIS)
    server.interrupt_after = 1
    conversation = server.conversation()

    with pytest.raises(KeyboardInterrupt):
        chat.answer(conversation, "France?", screen())

    assert server.is_closed_early
    assert conversation.messages[-1] == {"role": "assistant", "content": "Par"}


def test_an_error_takes_the_prompt_back() -> None:
    server = FakeServer(*PARIS)
    server.refuse_prompt = "bad"
    conversation, err = server.conversation(), io.StringIO()

    assert not chat.answer(conversation, "bad", screen(err=err))
    assert conversation.messages == []
    assert err.getvalue() == "xeray: the server answered 400: refused\n"


def test_json_lines() -> None:
    out = io.StringIO()
    shown = screen(out=out, as_json=True, show_stats=True)
    chat.answer(FakeServer(*THINKING).conversation(), "France?", shown)

    answer = json.loads(out.getvalue())
    assert (answer["content"], answer["reasoning_content"]) == ("Paris", "hm")
    assert set(answer["stats"]) >= {"ttft_s", "tokens_per_s", "num_completion_tokens"}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> FakeServer:
    """The server that `xeray chat` itself reaches."""
    fake = FakeServer(*PARIS)
    monkeypatch.setattr(
        chat,
        "connect",
        lambda url, key: connect(url, key, transport=httpx.MockTransport(fake)),
    )
    return fake


def test_a_pipe_gives_one_prompt_per_line(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\n two \n"))

    assert main(["chat", "--temperature", "0", "--system", "s"]) == 0
    assert capsys.readouterr().out == "Paris\nParis\n"
    assert [body["messages"][-1]["content"] for body in server.bodies] == ["one", "two"]
    assert server.bodies[0]["temperature"] == 0.0
    assert "top_p" not in server.bodies[0]


def test_a_failed_line_does_not_stop_the_others(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server.refuse_prompt = "bad"
    monkeypatch.setattr("sys.stdin", io.StringIO("bad\ngood\n"))

    assert main(["chat"]) == 1
    captured = capsys.readouterr()
    assert captured.out == "Paris\n"
    assert "refused" in captured.err


def test_one_question(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "France?", "--stats"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "Paris\n"
    assert captured.err.startswith("TTFT ")


def test_typed_commands(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = iter(["one", "/clear", "two", "/help", "", "/exit", "never"])
    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setattr("builtins.input", lambda _: next(typed))

    assert main(["chat"]) == 0
    assert [len(body["messages"]) for body in server.bodies] == [1, 1]
    assert capsys.readouterr().err.count("/clear") == 2


def test_ctrl_c_stops_the_answer_and_the_second_leaves(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.interrupt_after = 1
    prompts = iter(["one"])

    def typed(_: str) -> str:
        try:
            return next(prompts)
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setattr("builtins.input", typed)

    assert main(["chat"]) == 0
    assert len(server.bodies) == 1
