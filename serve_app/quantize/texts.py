"""Texts: the two that travel with XeRay, and files of a user's own, as token ids.

Bundled, both in the public domain, from Project Gutenberg's plain texts (numbers 35 and 11) less
its header and licence, paragraphs unwrapped, captions and rows of asterisks left out:

- `time_machine.txt`: H. G. Wells, The Time Machine (1895); what `xeray eval` reads.
- `alice.txt`: Lewis Carroll, Alice's Adventures in Wonderland (1865); the calibration sample.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from serve_app.core.errors import ConfigError
from serve_app.text.tokenizer import Tokenizer

EVALUATION_TEXT = "time_machine.txt"
CALIBRATION_TEXT = "alice.txt"
_DATA = Path(__file__).parent / "data"


def bundled_text(name: str) -> str:
    """Return one of the texts that travel with XeRay."""
    return (_DATA / name).read_text(encoding="utf-8")


def read_texts(path: Path, param: str) -> list[str]:
    """Read a text file as one text, a .jsonl file as one text per line.

    A line is an object with `text`, or `messages` (their contents, joined by blank lines), or
    `prompt` with or without `completion`. Raises ConfigError that names the file and the line.
    """
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
        raise ConfigError(f"{param}: cannot read {path}: {reason}", param=param) from None
    if path.suffix != ".jsonl":
        return [content]
    lines = [(number, line) for number, line in enumerate(content.splitlines(), 1) if line.strip()]
    return [
        _line_text(line, f"{param}: {path.name}, line {number}", param) for number, line in lines
    ]


def _line_text(line: str, place: str, param: str) -> str:
    try:
        values = json.loads(line)
    except ValueError:
        raise ConfigError(f"{place} is no JSON", param=param) from None
    if isinstance(values, dict):
        if isinstance(values.get("text"), str):
            return str(values["text"])
        if isinstance(values.get("prompt"), str):
            return str(values["prompt"]) + str(values.get("completion") or "")
        contents = [
            each.get("content") for each in values.get("messages") or () if isinstance(each, dict)
        ]
        if contents and all(isinstance(content, str) for content in contents):
            return "\n\n".join(contents)
    raise ConfigError(
        f"{place} has neither text, prompt nor messages with string contents", param=param
    )


def windows(
    texts: Sequence[str], tokenizer: Tokenizer, length: int, limit: int | None = None
) -> torch.Tensor:
    """Cut the texts' tokens, one text after the other, into int64 [n, length]; the rest is left.

    `limit` bounds n; then the windows are spread evenly over the whole. Each begins with the
    model's BOS where it has one that it puts in front of a text. Raises ConfigError where the text
    has less than one window.
    """
    prefix = tokenizer.encode("", add_special_tokens=True)
    ids = [i for text in texts for i in tokenizer.encode(text, add_special_tokens=False)]
    step = length - len(prefix)
    count = len(ids) // step if step > 0 else 0
    if not count:
        raise ConfigError(
            f"the text has {len(ids)} tokens, where one window has {length}; name a longer text",
            param="text",
        )
    chosen = range(count)
    if limit is not None and limit < count:
        chosen = [index * count // limit for index in range(limit)]  # type: ignore[assignment]
    rows = [[*prefix, *ids[index * step : (index + 1) * step]] for index in chosen]
    return torch.tensor(rows, dtype=torch.int64)
