"""What is fuzzed: each target takes bytes and may raise nothing but an error of ours.

``python targets.py NAME [libFuzzer options]`` runs one under atheris, guided by coverage; a fault
ends the process with its input in a file.
"""

import contextlib
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
    from serve_app.api.protocol.responses import ResponsesRequest
    from serve_app.api.responses_input import to_chat
    from serve_app.bench.wire import BodyDecoder, ProtocolError, SseDecoder, parse_head
    from serve_app.core.errors import XeRayError
    from serve_app.models.gguf import GGUFFile
    from serve_app.text.reasoning import ReasoningParser
    from serve_app.text.template_environment import BoundedTemplate
    from serve_app.text.tool_calls.registry import SYNTAXES
    from serve_app.text.tool_calls.stream import ToolCallParser

_MODELS = (ChatCompletionRequest, CompletionRequest, ResponsesRequest)
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


def body(data: bytes) -> None:
    """A request's body, of the kind that the first byte says: parsed, or refused with a 4xx."""
    model = _MODELS[(data[0] if data else 0) % len(_MODELS)]
    try:
        request = parse_request(model, data[1:])
        if isinstance(request, ResponsesRequest):
            to_chat(request)
    except XeRayError as error:
        assert 400 <= error.info().status < 500  # noqa: PT017 - no test function


def output(data: bytes) -> None:
    """Model output in any pieces: the same reasoning, answer and calls as from the whole."""
    target = reasoning if data[:1] < b"\x80" else tool_calls
    target(data[1:])


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


def tool_calls(data: bytes) -> None:
    """Model output in any pieces, in each syntax: the same content and the same calls."""
    kind = data[0] if data else 0
    syntax = sorted(SYNTAXES)[kind % len(SYNTAXES)]
    text = data[1:].decode("utf-8", "replace")
    size = kind // len(SYNTAXES) % 9 + 1
    max_calls = 1 if kind & 128 else None
    whole = _calls(syntax, text, len(text) or 1, max_calls)
    assert _calls(syntax, text, size, max_calls) == whole
    assert max_calls is None or len(whole[1]) <= max_calls


def _calls(
    syntax: str, text: str, size: int, max_calls: int | None
) -> tuple[str, list[tuple[str, str]]]:
    parser = ToolCallParser(SYNTAXES[syntax], max_calls)
    content, names, arguments = "", list[str](), list[str]()
    pieces = [parser.push(text[i : i + size]) for i in range(0, len(text), size)]
    for shown, deltas in (*pieces, parser.finish()):
        content += shown
        for delta in deltas:
            if delta.name is not None:
                assert delta.index == len(names), "calls are numbered as they come"
                names.append(delta.name)
                arguments.append("")
            arguments[delta.index] += delta.arguments
    return content, list(zip(names, arguments, strict=True))


def template(data: bytes) -> None:
    """A model's chat template: rendered within its bounds, or refused."""
    messages = [{"role": "user", "content": "hi"}]
    with contextlib.suppress(XeRayError):
        BoundedTemplate(data.decode("utf-8", "replace")).render({"messages": messages})


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


_V3 = "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>%s<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
_DEEPSEEK_V3 = _V3 % 'function<｜tool▁sep｜>f\n```json\n{"a": 1}\n```'
_DEEPSEEK_V31 = _V3 % 'f<｜tool▁sep｜>{"a": "b"}'
_HERMES = 'ok\n<tool_call>\n{"name": "f", "arguments": {"a": [1]}}\n</tool_call>'
_CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stop": ["x"], "n": 2}
SEEDS = {
    "gguf": [gguf_seed()],
    "sse": [b'data: {"a": 1}\n\ndata: [DONE]\n\n', b": ping\r\n\r\ndata: a\r\ndata: b\r\n\r\n"],
    "http": [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"],
    "body": [
        b"\0" + json.dumps(_CHAT).encode(),
        b'\1{"model": "m", "prompt": [[1, 2]], "logprobs": 1, "echo": true}',
        b'\2{"input": [{"role": "user", "content": "hi"}], "tools": []}',
    ],
    "output": [
        b"\0<think>a</think>b",
        b"\0x</think>y",
        *(
            bytes([128, place]) + text.encode()
            for place, text in enumerate((_DEEPSEEK_V3, _DEEPSEEK_V31, _HERMES))
        ),
    ],
    "template": [
        b"{% for m in messages %}<|im_start|>{{ m.role ~ m['content']|trim }}{% endfor %}",
        b"{% set ns = namespace(a=[1]|tojson(indent=2)) %}{{ '%5d' % 3 + ns.a.ljust(4) * 2 }}",
    ],
}
TARGETS = {function.__name__: function for function in (gguf, sse, http, body, output, template)}


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
