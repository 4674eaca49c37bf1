"""`xeray chat`: a conversation in the terminal, or one prompt per line from a pipe."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import IO, Any

from serve_app.cli.chat_client import ChatClient, TurnStats, connect, default_model
from serve_app.core.errors import XeRayError

DEFAULT_URL = "http://127.0.0.1:8000"
DIM, RESET = "\x1b[2m", "\x1b[0m"
HELP = "/clear forgets the conversation, /exit leaves; Ctrl-C stops an answer"
# Option → type and help; each goes into the request under the name of the API.
PARAMETERS: dict[str, tuple[type, str]] = {
    "temperature": (float, "0 is greedy"),
    "top_p": (float, "nucleus sampling, 0–1"),
    "max_tokens": (int, "longest answer"),
    "seed": (int, "same seed, same answer"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `xeray chat`."""
    parser.add_argument(
        "prompt", nargs="?", help="ask this once and leave; default: a conversation"
    )
    parser.add_argument("--url", default=DEFAULT_URL, help="server (default: %(default)s)")
    parser.add_argument("--model", help="model id (default: the server's first)")
    parser.add_argument("--system", help="system message at the head of the conversation")
    parser.add_argument(
        "--api-key",
        default=os.environ.get("XERAY_API_KEY"),
        help="key sent to the server (default: the environment's XERAY_API_KEY)",
    )
    for name, (kind, text) in PARAMETERS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help=text)
    parser.add_argument(
        "--stats", action="store_true", help="print times and counts of each answer"
    )
    parser.add_argument("--json", action="store_true", help="print each answer as one JSON line")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Converse until the input ends; 1 when an answer of a pipe failed."""
    with connect(options.url, options.api_key) as http:
        parameters = {name: getattr(options, name) for name in PARAMETERS}
        client = ChatClient(
            http=http,
            model=options.model or default_model(http),
            parameters={name: value for name, value in parameters.items() if value is not None},
        )
        conversation = Conversation(client, system=options.system)
        screen = Screen(show_stats=options.stats, as_json=options.json)
        if options.prompt is not None:
            return 0 if answer(conversation, options.prompt, screen) else 1
        if sys.stdin.isatty():
            return _converse(conversation, screen)
        return _answer_lines(conversation, screen, sys.stdin)


@dataclass(slots=True)
class Conversation:
    """The messages so far, the system message first."""

    client: ChatClient
    system: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget everything but the system message."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []


@dataclass(slots=True)
class Screen:
    """Where answers go: text to `out`; reasoning dimmed, or to `err` where `out` is no terminal."""

    show_stats: bool = False
    as_json: bool = False
    out: IO[str] = field(default_factory=lambda: sys.stdout)
    err: IO[str] = field(default_factory=lambda: sys.stderr)
    _is_dim: bool = False

    def show(self, text: str, is_reasoning: bool) -> None:
        """Write a piece at once."""
        if self.as_json:
            return
        if is_reasoning and not self.out.isatty():
            self.err.write(text)
            self.err.flush()
            return
        if is_reasoning != self._is_dim:
            self.out.write(DIM if is_reasoning else f"{RESET}\n\n")
            self._is_dim = is_reasoning
        self.out.write(text)
        self.out.flush()

    def finish(self, answer: str, reasoning: str, stats: TurnStats) -> None:
        """End an answer: the line's end, and the statistics if asked for."""
        if self.as_json:
            result: dict[str, Any] = {"content": answer, "reasoning_content": reasoning or None}
            if self.show_stats:
                result["stats"] = asdict(stats) | {"tokens_per_s": stats.tokens_per_s}
            self.out.write(json.dumps(result, ensure_ascii=False))
        elif self._is_dim:
            self.out.write(RESET)
            self._is_dim = False
        self.out.write("\n")
        self.out.flush()
        if self.show_stats and not self.as_json:
            is_terminal = self.err.isatty()
            print(f"{DIM}{stats.line()}{RESET}" if is_terminal else stats.line(), file=self.err)


def answer(conversation: Conversation, prompt: str, screen: Screen) -> bool:
    """Ask and show one answer; what was shown becomes part of the conversation.

    KeyboardInterrupt ends the answer and is raised again. An error is shown, the prompt is taken
    back, and False is returned.
    """
    conversation.messages.append({"role": "user", "content": prompt})
    stats = TurnStats()
    texts: dict[bool, list[str]] = {False: [], True: []}
    stream = conversation.client.stream(conversation.messages, stats)
    try:
        with contextlib.closing(stream):
            for piece in stream:
                texts[piece.is_reasoning].append(piece.text)
                screen.show(piece.text, piece.is_reasoning)
    except XeRayError as error:
        conversation.messages.pop()
        print(f"xeray: {error.message}", file=screen.err)
        return False
    except KeyboardInterrupt:
        _keep(conversation, texts, stats, screen)
        raise
    _keep(conversation, texts, stats, screen)
    return True


def _keep(
    conversation: Conversation, texts: dict[bool, list[str]], stats: TurnStats, screen: Screen
) -> None:
    content = "".join(texts[False])
    conversation.messages.append({"role": "assistant", "content": content})
    screen.finish(content, "".join(texts[True]), stats)


def _converse(conversation: Conversation, screen: Screen) -> int:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  line editing and history for input()
    print(f"{conversation.client.model} · {HELP}", file=screen.err)
    for prompt in _typed_prompts():
        if prompt == "/exit":
            break
        if prompt == "/clear":
            conversation.clear()
        elif prompt.startswith("/"):
            print(HELP, file=screen.err)
        else:
            with contextlib.suppress(KeyboardInterrupt):
                answer(conversation, prompt, screen)
    return 0


def _typed_prompts() -> Iterator[str]:
    while True:
        try:
            prompt = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if prompt:
            yield prompt


def _answer_lines(conversation: Conversation, screen: Screen, lines: IO[str]) -> int:
    prompts = (line.strip() for line in lines)
    answered = [answer(conversation, prompt, screen) for prompt in prompts if prompt]
    return 0 if all(answered) else 1
