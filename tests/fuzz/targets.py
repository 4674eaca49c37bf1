"""What is fuzzed: each target takes bytes and may raise nothing but an error of ours.

``python targets.py NAME [libFuzzer options]`` runs one under atheris, guided by coverage; a fault
ends the process with its input in a file.
"""

import json
import struct
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["serve_app"]):
    from serve_app.api.protocol.base import parse_request
    from serve_app.api.protocol.chat import ChatCompletionRequest
    from serve_app.api.protocol.completions import CompletionRequest
    from serve_app.bench.wire import BodyDecoder, ProtocolError, SseDecoder, parse_head
    from serve_app.core.errors import XeRayError
    from serve_app.models.gguf import GGUFFile
    from serve_app.text.reasoning import ReasoningParser

_FOLDER = Path(tempfile.mkdtemp(prefix="xeray-fuzz-"))


def gguf(data: bytes) -> None:
    """A model file: a hostile one is one ConfigError, and no length is believed."""
    path = _FOLDER / "model.gguf"
    path.write_bytes(data)
    try:
        file = GGUFFile(path)
        for name in file.tensors:
            file.data(name)
    except XeRayError:
        pass


def sse(data: bytes) -> None:
    """An answer's bytes in any pieces: the events are those of the whole."""
    cut = data[0] % 16 + 1 if data else 1
    whole = SseDecoder()
    expected = whole.feed(data)
    pieces = SseDecoder()
    found = [event for i in range(0, len(data), cut) for event in pieces.feed(data[i : i + cut])]
    assert found == expected


def http(data: bytes) -> None:
    """An answer's head and chunked body."""
    try:
        parsed = parse_head(data)
        if parsed is not None:
            head, rest = parsed
            BodyDecoder(head).feed(rest)
    except ProtocolError:
        pass


def chat_body(data: bytes) -> None:
    """A request's body: parsed, or refused with a 4xx."""
    _parse(ChatCompletionRequest, data)


def completion_body(data: bytes) -> None:
    """The same for completions."""
    _parse(CompletionRequest, data)


def _parse(model: type, data: bytes) -> None:
    try:
        request = parse_request(model, data)
        request.check_extras()
    except XeRayError as error:
        assert 400 <= error.info().status < 500  # noqa: PT017 - no test function


def reasoning(data: bytes) -> None:
    """Model output in any pieces: the same reasoning and the same answer."""
    text = data.decode("utf-8", "replace")
    cut = data[0] % 7 + 1 if data else 1
    starts = bool(data) and data[0] & 1 == 0
    assert _split(text, len(text) or 1, starts) == _split(text, cut, starts)


def _split(text: str, size: int, starts_in_reasoning: bool) -> tuple[str, str]:
    parser = ReasoningParser("deepseek_r1", starts_in_reasoning)
    parts = [parser.push(text[i : i + size]) for i in range(0, len(text), size)]
    parts.append(parser.finish())
    return "".join(part[0] for part in parts), "".join(part[1] for part in parts)


def gguf_seed() -> bytes:
    """A small valid file: two keys and one tensor of 32 floats."""

    def string(text: str) -> bytes:
        return struct.pack("<Q", len(text)) + text.encode()

    header = b"GGUF" + struct.pack("<IQQ", 3, 1, 2)
    keys = string("general.architecture") + struct.pack("<I", 8) + string("llama")
    keys += string("a.b") + struct.pack("<IIQ", 9, 4, 2) + struct.pack("<II", 1, 2)
    tensor = string("w") + struct.pack("<IQIQ", 1, 32, 0, 0)
    head = header + keys + tensor
    return head + bytes(-len(head) % 32) + bytes(32 * 4)


_CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stop": ["x"], "n": 2}
SEEDS = {
    "gguf": [gguf_seed()],
    "sse": [b'data: {"a": 1}\n\ndata: [DONE]\n\n', b": ping\r\n\r\ndata: a\r\ndata: b\r\n\r\n"],
    "http": [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"],
    "chat_body": [json.dumps(_CHAT).encode()],
    "completion_body": [b'{"model": "m", "prompt": [[1, 2]], "logprobs": 1, "echo": true}'],
    "reasoning": [b"<think>a</think>b", b"x</think>y"],
}
TARGETS = {
    function.__name__: function
    for function in (gguf, sse, http, chat_body, completion_body, reasoning)
}


def main() -> None:
    """Fuzz one target; options are libFuzzer's."""
    name = sys.argv[1]
    corpus = _FOLDER / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(SEEDS[name]):
        (corpus / str(number)).write_bytes(seed)
    atheris.Setup([sys.argv[0], *sys.argv[2:], str(corpus)], TARGETS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
