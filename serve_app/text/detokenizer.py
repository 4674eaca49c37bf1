"""Token ids of one sequence to text, piece by piece, in time proportional to the new tokens."""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from serve_app.text.tokenizer import Tokenizer


class Detokenizer:
    """Incremental decoding; the pieces joined equal `Tokenizer.decode` of all ids.

    A character whose bytes are not complete is held back until they are, or until `finish`.
    is_continuation: the text goes on from a prompt, so the space in front that SentencePiece
    vocabularies drop at the start of a text is real and stays.
    shown_special_tokens: names that stay although special tokens are skipped.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        skip_special_tokens: bool = True,
        is_continuation: bool = False,
        shown_special_tokens: Iterable[str] = (),
    ) -> None:
        self._token_bytes = tokenizer.token_bytes
        shown = {tokenizer.special_tokens.get(name) for name in shown_special_tokens}
        self._skipped_ids = tokenizer.special_ids - shown if skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._drops_space = tokenizer.strips_leading_space and not is_continuation

    def push(self, token_ids: Iterable[int]) -> str:
        """Take the next ids; return the text that is complete now."""
        skipped = self._skipped_ids
        data = b"".join([self._token_bytes(i) for i in token_ids if i not in skipped])
        return self._trim(self._decoder.decode(data)) if data else ""

    def finish(self) -> str:
        """Return what was held back, as U+FFFD; nothing may be pushed afterwards."""
        return self._trim(self._decoder.decode(b"", final=True))

    def _trim(self, text: str) -> str:
        if not self._drops_space or not text:
            return text
        self._drops_space = False
        return text.removeprefix(" ")
