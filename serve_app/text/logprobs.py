"""Log-probabilities of token ids as the API shows them: each token's text and bytes."""

from __future__ import annotations

from collections.abc import Sequence

from serve_app.core.events import TokenLogprob
from serve_app.core.requests import LogprobItem
from serve_app.text.tokenizer import Tokenizer


def to_logprob_item(tokenizer: Tokenizer, entry: TokenLogprob) -> LogprobItem:
    """Return `entry` as text; bytes that are no whole character show as U+FFFD in `token`."""
    return LogprobItem(
        token=tokenizer.token_text(entry.token_id),
        logprob=entry.logprob,
        bytes=tuple(tokenizer.token_bytes(entry.token_id)),
        top=tuple(
            (tokenizer.token_text(token_id), logprob, tuple(tokenizer.token_bytes(token_id)))
            for token_id, logprob in entry.top
        ),
    )


def to_logprob_items(
    tokenizer: Tokenizer, entries: Sequence[TokenLogprob | None]
) -> tuple[LogprobItem | None, ...]:
    """Convert prompt log-probabilities; the first token has none."""
    return tuple(None if entry is None else to_logprob_item(tokenizer, entry) for entry in entries)
