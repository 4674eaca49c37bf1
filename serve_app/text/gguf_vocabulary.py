"""A tokenizer from a GGUF file's metadata, id for id what llama.cpp and the model's makers produce.

Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (tokenizer.ggml.*). Two kinds of
vocabulary are known: `gpt2` (byte-level BPE) and `llama` (SentencePiece BPE with byte fallback).
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, models, normalizers
from tokenizers import Tokenizer as Pipeline

from serve_app.core.errors import ConfigError
from serve_app.models.gguf import GGUFFile
from serve_app.text.parts import TokenizerParts
from serve_app.text.pre_tokenizers import PRE_TOKENIZERS
from serve_app.text.vocabulary import Spelling


class TokenType(IntEnum):
    """`tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


_SPECIAL_TYPES = (TokenType.UNKNOWN, TokenType.CONTROL)
_ADDED_TYPES = (*_SPECIAL_TYPES, TokenType.USER_DEFINED)
_NAMED_KEYS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "sep_token": "seperator_token_id",  # spelt so in the format
    "pad_token": "padding_token_id",
}
_END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
# Control tokens that end a turn whatever eos_token_id says: conversions often name one only.
_END_NAMES = frozenset(
    {
        "<|endoftext|>",
        "<|end_of_text|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|im_end|>",
        "<|end|>",
        "<end_of_turn>",
        "<｜end▁of▁sentence｜>",
        "<|EOT|>",
    }
)


def load_gguf_parts(path: Path) -> TokenizerParts:
    """Build the tokenizer of a GGUF file. ConfigError where its vocabulary is missing, unknown."""
    return parts_from_metadata(GGUFFile(path).metadata, path.name)


def parts_from_metadata(metadata: Mapping[str, Any], file_name: str) -> TokenizerParts:
    """Build the tokenizer that `metadata` describes; `file_name` is for the error messages."""
    keys = _Keys(metadata, file_name)
    tokens: list[str] = keys.required("tokens")
    types = _token_types(keys, len(tokens))
    if keys.required("model") == "gpt2":
        pipeline, spelling = _byte_level(keys, tokens), Spelling.BYTE_LEVEL
    else:
        pipeline, spelling = _sentencepiece(keys, tokens, types), Spelling.SENTENCEPIECE
    is_sentencepiece = spelling is Spelling.SENTENCEPIECE
    has_space_prefix = bool(keys.get("add_space_prefix", is_sentencepiece))
    prefix, suffix = _surrounding(keys, is_sentencepiece or _is_adding_bos(keys))
    return TokenizerParts(
        pipeline=pipeline,
        added_tokens=_added_tokens(tokens, types),
        spelling=spelling,
        strips_leading_space=is_sentencepiece and has_space_prefix,
        vocab_size=len(tokens),
        model_id_limit=len(tokens),
        bos_token_id=keys.token_id("bos_token_id"),
        eos_token_ids=_end_ids(keys, tokens, types),
        prefix_ids=prefix,
        suffix_ids=suffix,
        named_tokens=_named_tokens(keys, tokens),
        chat_template=metadata.get("tokenizer.chat_template"),
    )


class _Keys:
    """The `tokenizer.ggml.*` part of the metadata, with errors that name file and key."""

    def __init__(self, metadata: Mapping[str, Any], file_name: str) -> None:
        self._metadata = metadata
        self._file_name = file_name
        self._vocab_size = len(metadata.get("tokenizer.ggml.tokens", ()))

    def get(self, key: str, default: Any = None) -> Any:
        return self._metadata.get(f"tokenizer.ggml.{key}", default)

    def required(self, key: str) -> Any:
        value = self.get(key)
        if value is None or (key == "tokens" and not len(value)):
            raise self.error(f"has no tokenizer.ggml.{key}; convert the model again")
        if key == "model" and value not in ("gpt2", "llama"):
            raise self.error(
                f"has the vocabulary kind {value!r} (tokenizer.ggml.model);"
                " supported are gpt2 and llama: use the model's Hugging Face folder instead"
            )
        return value

    def token_id(self, key: str) -> int | None:
        value = self.get(key)
        return int(value) if value is not None and 0 <= value < self._vocab_size else None

    def error(self, text: str) -> ConfigError:
        return ConfigError(f"model.path: {self._file_name} {text}", param="model.path")


def _token_types(keys: _Keys, num_tokens: int) -> list[int]:
    types = keys.get("token_type")
    if types is None:
        return [TokenType.NORMAL] * num_tokens
    if len(types) != num_tokens:
        raise keys.error(f"lists {num_tokens} tokens but {len(types)} token types")
    return [int(kind) for kind in types]


def _byte_level(keys: _Keys, tokens: list[str]) -> Pipeline:
    name = keys.get("pre", "default")
    pre_tokenization = PRE_TOKENIZERS.get(name)
    if pre_tokenization is None:
        raise keys.error(
            f"has the pre-tokenizer {name!r} (tokenizer.ggml.pre), which is not supported;"
            f" known are {', '.join(PRE_TOKENIZERS)}: use the model's Hugging Face folder instead"
        )
    merges = [_split_merge(merge) for merge in keys.required("merges")]
    model = _bpe(keys, tokens, merges, ignore_merges=pre_tokenization.is_ignoring_merges)
    pipeline = Pipeline(model)
    pipeline.normalizer = pre_tokenization.normalizer()
    pipeline.pre_tokenizer = pre_tokenization.build()
    return pipeline


def _is_adding_bos(keys: _Keys) -> bool:
    return PRE_TOKENIZERS[keys.get("pre", "default")].is_adding_bos


def _split_merge(merge: str) -> tuple[str, str]:
    # Either half may hold a space only as its first character, so the first one past it divides.
    left, _, right = merge[1:].partition(" ")
    return merge[:1] + left, right


def _sentencepiece(keys: _Keys, tokens: list[str], types: list[int]) -> Pipeline:
    merges = keys.get("merges")
    if merges is not None:
        pairs = [_split_merge(merge) for merge in merges]
    else:
        pairs = _merges_by_score(tokens, types, keys.required("scores"))
    unknown_id = keys.token_id("unknown_token_id")
    model = _bpe(
        keys,
        tokens,
        pairs,
        byte_fallback=TokenType.BYTE in types,
        fuse_unk=True,
        unk_token=tokens[unknown_id] if unknown_id is not None else None,
    )
    steps: list[normalizers.Normalizer] = [normalizers.Replace(" ", "\u2581")]
    if keys.get("add_space_prefix", True):
        steps.insert(0, normalizers.Prepend("\u2581"))
    pipeline = Pipeline(model)
    pipeline.normalizer = normalizers.Sequence(steps)
    return pipeline


def _merges_by_score(tokens: list[str], types: list[int], scores: Any) -> list[tuple[str, str]]:
    """Rank every pair of tokens that joins to a token by the joined token's score, best first."""
    joinable = {
        token: float(score)
        for token, kind, score in zip(tokens, types, scores, strict=True)
        if kind in (TokenType.NORMAL, TokenType.USER_DEFINED)
    }
    ranked = [
        (-score, cut, token)
        for token, score in joinable.items()
        for cut in range(1, len(token))
        if token[:cut] in joinable and token[cut:] in joinable
    ]
    ranked.sort()
    return [(token[:cut], token[cut:]) for _, cut, token in ranked]


def _bpe(
    keys: _Keys, tokens: list[str], merges: list[tuple[str, str]], **options: Any
) -> models.BPE:
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise keys.error("lists the same token twice; convert the model again")
    try:
        return models.BPE(vocabulary, merges, **options)
    except Exception as error:  # the library raises bare Exception for merges of unknown tokens
        raise keys.error(f"has merges that do not fit its tokens: {error}") from None


def _added_tokens(tokens: list[str], types: list[int]) -> dict[int, AddedToken]:
    return {
        token_id: AddedToken(tokens[token_id], normalized=False, special=kind in _SPECIAL_TYPES)
        for token_id, kind in enumerate(types)
        if kind in _ADDED_TYPES and tokens[token_id]
    }


def _surrounding(keys: _Keys, is_bos_usual: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    bos, eos = keys.token_id("bos_token_id"), keys.token_id("eos_token_id")
    prefix = (bos,) if bos is not None and keys.get("add_bos_token", is_bos_usual) else ()
    suffix = (eos,) if eos is not None and keys.get("add_eos_token", False) else ()
    return prefix, suffix


def _end_ids(keys: _Keys, tokens: list[str], types: list[int]) -> tuple[int, ...]:
    named = [token_id for key in _END_KEYS if (token_id := keys.token_id(key)) is not None]
    by_text = [
        token_id
        for token_id, kind in enumerate(types)
        if kind == TokenType.CONTROL and tokens[token_id] in _END_NAMES
    ]
    return tuple(dict.fromkeys([*named, *by_text]))


def _named_tokens(keys: _Keys, tokens: list[str]) -> dict[str, str]:
    return {
        name: tokens[token_id]
        for name, key in _NAMED_KEYS.items()
        if (token_id := keys.token_id(key)) is not None
    }
