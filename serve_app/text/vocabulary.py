"""What a token stands for in bytes, for the three ways in which vocabularies spell their tokens."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from enum import StrEnum

_SPACE_MARK = "\u2581"  # ▁, SentencePiece's visible space
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Spelling(StrEnum):
    """How a vocabulary spells bytes as text."""

    BYTE_LEVEL = "byte_level"  # GPT-2: each byte is one printable character
    SENTENCEPIECE = "sentencepiece"  # ▁ is a space, <0x0A> a byte, the rest UTF-8
    WORDS = "words"  # whole words, joined by spaces


def byte_level_alphabet() -> dict[str, int]:
    """Return GPT-2's table, character → byte: printable Latin-1 stands for itself."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    table.update({chr(256 + index): byte for index, byte in enumerate(others)})
    return table


_ALPHABET = byte_level_alphabet()


def _byte_level(token: str) -> bytes:
    try:
        return bytes([_ALPHABET[char] for char in token])
    except KeyError:  # not spelt in the alphabet: an added token, plain text
        return token.encode()


def _sentencepiece(token: str) -> bytes:
    if match := _BYTE_TOKEN.fullmatch(token):
        return bytes([int(match[1], 16)])
    return token.replace(_SPACE_MARK, " ").encode()


def _words(token: str) -> bytes:
    return b" " + token.encode()


_SPELLERS: dict[Spelling, Callable[[str], bytes]] = {
    Spelling.BYTE_LEVEL: _byte_level,
    Spelling.SENTENCEPIECE: _sentencepiece,
    Spelling.WORDS: _words,
}


class Vocabulary:
    """Token ids and their bytes; each id's bytes are worked out once.

    `added` are the ids of tokens whose text is plain (special and user-defined ones).
    """

    def __init__(
        self,
        size: int,
        id_to_token: Callable[[int], str | None],
        spelling: Spelling,
        added: Mapping[int, str],
    ) -> None:
        self.size = size
        self.spelling = spelling
        self._id_to_token = id_to_token
        self._spell = _SPELLERS[spelling]
        self._added = added
        self._bytes: list[bytes | None] = [None] * size

    def token_bytes(self, token_id: int) -> bytes:
        """Return the token's bytes; an id outside the vocabulary, or without a token, has none."""
        if not 0 <= token_id < self.size:
            return b""
        known = self._bytes[token_id]
        if known is None:
            known = self._bytes[token_id] = self._work_out(token_id)
        return known

    def _work_out(self, token_id: int) -> bytes:
        if (text := self._added.get(token_id)) is not None:
            return text.encode() if self.spelling is not Spelling.WORDS else _words(text)
        token = self._id_to_token(token_id)
        return b"" if token is None else self._spell(token)
