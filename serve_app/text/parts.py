"""What the two loaders (GGUF, Hugging Face folder) hand to the Tokenizer."""

from __future__ import annotations

from dataclasses import dataclass, field

from tokenizers import AddedToken
from tokenizers import Tokenizer as Pipeline

from serve_app.text.vocabulary import Spelling


@dataclass(frozen=True, slots=True)
class TokenizerParts:
    """A tokenizer taken apart.

    Pipeline:
        pipeline: normaliser, pre-tokeniser, model and post-processor, with no added tokens yet.
        added_tokens: id → token with its flags; `special` ones are control tokens.
    Text form:
        spelling: how tokens spell bytes. strips_leading_space: decoding drops one space in front.
    Ids:
        vocab_size: one more than the largest id; model_id_limit: the same without added tokens.
        eos_token_ids: what ends an answer.
        prefix_ids, suffix_ids: what `add_special_tokens` puts around a text (often the BOS).
        named_tokens: bos_token, eos_token, unk_token, pad_token … as chat templates see them.
    """

    pipeline: Pipeline
    added_tokens: dict[int, AddedToken]
    spelling: Spelling
    strips_leading_space: bool
    vocab_size: int
    model_id_limit: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    prefix_ids: tuple[int, ...] = ()
    suffix_ids: tuple[int, ...] = ()
    named_tokens: dict[str, str] = field(default_factory=dict)
    chat_template: str | None = None
