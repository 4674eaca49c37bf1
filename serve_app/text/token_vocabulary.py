"""What an engine, which knows ids alone, needs of a tokenizer to follow constraints."""

from __future__ import annotations

from serve_app.core.sampling import TokenVocabulary
from serve_app.text.chat_template import THINK_CLOSE, THINK_OPEN
from serve_app.text.tokenizer import Tokenizer

_CLOSING = f"\n{THINK_CLOSE}\n\n"
"""How a thought that was cut short ends: as models of R1's form end theirs."""


def token_vocabulary(tokenizer: Tokenizer) -> TokenVocabulary:
    """Return each id's bytes, and the ids around thinking."""
    opening = tokenizer.encode(THINK_OPEN, add_special_tokens=False, parse_special=True)
    closing = tokenizer.encode(_CLOSING, add_special_tokens=False, parse_special=True)
    return TokenVocabulary(
        tokens=tuple(map(tokenizer.token_bytes, range(tokenizer.vocab_size))),
        special_ids=tuple(sorted(tokenizer.special_ids)),
        eos_ids=tuple(tokenizer.eos_token_ids),
        think_open_id=opening[0] if len(opening) == 1 else None,
        think_close_ids=tuple(closing),
    )
