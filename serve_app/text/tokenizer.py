"""Text to token ids and back, for the model's own vocabulary.

User text is data: a special token's name in it is spelt out in ordinary tokens. Two pipelines share
one vocabulary. `_parsing` knows special tokens by their own names, as Hugging Face does; `_guarded`
knows them only behind a mark that is drawn at random when the process starts, so no text from
outside can name one. Tokens that the model declares as plain additions (GGUF's user-defined ones,
`special: false` in tokenizer.json) are found by both, as in llama.cpp and Hugging Face.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from tokenizers import AddedToken, Encoding
from tokenizers import Tokenizer as Pipeline

from serve_app.config.model_source import ModelFormat, ModelSource
from serve_app.core.errors import ClientError, ConfigError
from serve_app.text.gguf_vocabulary import load_gguf_parts
from serve_app.text.hf_vocabulary import load_hf_parts
from serve_app.text.parts import TokenizerParts
from serve_app.text.vocabulary import Vocabulary

_MARK_BASE = "\uf8ff"  # private use; the random digits behind it are what cannot be guessed


class Tokenizer:
    """The tokenizer of one model. Safe to use from several threads."""

    def __init__(self, parts: TokenizerParts) -> None:
        self.vocab_size = parts.vocab_size
        self.bos_token_id = parts.bos_token_id
        self.eos_token_ids = parts.eos_token_ids
        self.named_tokens = parts.named_tokens
        self.chat_template = parts.chat_template
        self.strips_leading_space = parts.strips_leading_space
        self.special_tokens: dict[str, int] = {
            token.content: token_id
            for token_id, token in parts.added_tokens.items()
            if token.special
        }
        self.special_ids = frozenset(self.special_tokens.values())
        self.special_mark = _MARK_BASE + secrets.token_hex(8)
        self._prefix_ids = list(parts.prefix_ids)
        self._suffix_ids = list(parts.suffix_ids)
        self._vocabulary = Vocabulary(
            parts.vocab_size,
            parts.pipeline.id_to_token,
            parts.spelling,
            {token_id: token.content for token_id, token in parts.added_tokens.items()},
        )
        self._parsing = _MarkedPipeline(parts, mark="")
        self._guarded = _MarkedPipeline(parts, mark=self.special_mark)

    def encode(
        self, text: str, *, add_special_tokens: bool, parse_special: bool = False
    ) -> list[int]:
        """Return the ids of `text`; ClientError if it is no valid Unicode.

        add_special_tokens: put the model's BOS (or EOS) around it, as the model was trained.
        parse_special: the names of special tokens in the text become those tokens. Never for text
        from a user.
        """
        pipeline = self._parsing if parse_special else self._guarded
        return self._wrap(pipeline.encode(text), add_special_tokens)

    def encode_batch(
        self, texts: Sequence[str], *, add_special_tokens: bool, parse_special: bool = False
    ) -> list[list[int]]:
        """Return the ids of each text, on several cores where RAYON_NUM_THREADS allows."""
        pipeline = self._parsing if parse_special else self._guarded
        return [self._wrap(ids, add_special_tokens) for ids in pipeline.encode_batch(list(texts))]

    def encode_marked(self, text: str) -> list[int]:
        """Return the ids of a text in which `special_mark` in front of a name makes it special."""
        return self._guarded.encode(text, param="messages")

    def encode_marked_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each marked text, on several cores where RAYON_NUM_THREADS allows."""
        return self._guarded.encode_batch(list(texts), param="messages")

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of `token_ids`; bytes that are no valid UTF-8 become U+FFFD."""
        kept = self.visible_ids(token_ids) if skip_special_tokens else token_ids
        data = b"".join(map(self._vocabulary.token_bytes, kept))
        text = data.decode("utf-8", errors="replace")
        return text[1:] if self.strips_leading_space and text.startswith(" ") else text

    def visible_ids(self, token_ids: Sequence[int]) -> list[int]:
        """Return `token_ids` without the special ones."""
        return [token_id for token_id in token_ids if token_id not in self.special_ids]

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that a token stands for, possibly a part of a UTF-8 character."""
        return self._vocabulary.token_bytes(token_id)

    def token_text(self, token_id: int) -> str:
        """Return a token's own text; incomplete UTF-8 shows as U+FFFD."""
        return self._vocabulary.token_bytes(token_id).decode("utf-8", errors="replace")

    def _wrap(self, ids: list[int], add_special_tokens: bool) -> list[int]:
        if not add_special_tokens or not (self._prefix_ids or self._suffix_ids):
            return ids
        return [*self._prefix_ids, *ids, *self._suffix_ids]


class _MarkedPipeline:
    """The model's pipeline with its special tokens named behind `mark`.

    A name with a mark is not in the vocabulary, so the library gives it a new id past the end;
    `_real_ids` leads from there to the id that the model knows.
    """

    def __init__(self, parts: TokenizerParts, mark: str) -> None:
        base = parts.pipeline
        self._pipeline = Pipeline(base.model)  # shares the vocabulary, copies nothing
        self._pipeline.normalizer = base.normalizer
        self._pipeline.pre_tokenizer = base.pre_tokenizer
        self._fill_holes(parts)
        by_id = {
            i: _renamed(t, mark + t.content if t.special else t.content)
            for i, t in parts.added_tokens.items()
        }
        tokens = list(by_id.values())
        self._pipeline.add_tokens(tokens)
        self._real_ids = {
            given: token_id
            for token_id, token in by_id.items()
            if (given := self._pipeline.token_to_id(token.content)) != token_id
        }
        self._renamed_ids = frozenset(self._real_ids)

    def _fill_holes(self, parts: TokenizerParts) -> None:
        """Move the ids of new names past the vocabulary's largest id, where its ids have gaps."""
        size = parts.pipeline.get_vocab_size(with_added_tokens=False)
        gaps = parts.model_id_limit - size
        if gaps > 0:
            mark = secrets.token_hex(16)
            self._pipeline.add_special_tokens([f"{mark}{index}" for index in range(gaps)])

    def encode(self, text: str, param: str = "prompt") -> list[int]:
        # The library's `encode` holds the interpreter's lock all the while; a batch lets it go.
        return self.encode_batch([text], param)[0]

    def encode_batch(self, texts: list[str], param: str = "prompt") -> list[list[int]]:
        with _unicode_errors(param):
            encodings = self._pipeline.encode_batch_fast(texts, add_special_tokens=False)
        return [self._ids(encoding) for encoding in encodings]

    def _ids(self, encoding: Encoding) -> list[int]:
        ids: list[int] = encoding.ids  # a copy, made anew at each access
        if self._renamed_ids.isdisjoint(ids):
            return ids
        real_ids = self._real_ids
        return [real_ids.get(token_id, token_id) for token_id in ids]


@contextmanager
def _unicode_errors(param: str) -> Iterator[None]:
    try:
        yield
    except TypeError:  # how the library says that a string has no UTF-8 form
        raise ClientError(
            "the text is not valid Unicode (it has a lone surrogate)", param=param
        ) from None


def _renamed(token: AddedToken, content: str) -> AddedToken:
    return AddedToken(
        content,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=token.normalized and not token.special,
        special=token.special,
    )


def load_tokenizer(source: ModelSource, *, chat_template_override: str | None = None) -> Tokenizer:
    """Load the tokenizer of a model; ConfigError, one line, where its files are missing or unknown.

    chat_template_override: a Jinja template, or the path of one, that replaces the model's own.
    """
    load = load_gguf_parts if source.format is ModelFormat.GGUF else load_hf_parts
    parts = load(source.path)
    if chat_template_override is not None:
        parts = replace(parts, chat_template=_read_template(chat_template_override))
    return Tokenizer(parts)


def _read_template(override: str) -> str:
    if "{{" in override or "{%" in override:
        return override
    try:
        return Path(override).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"model.chat_template: cannot read {override}: {error.__class__.__name__};"
            " name a file that holds a Jinja template",
            param="model.chat_template",
        ) from None
