"""A tokenizer from a Hugging Face folder: tokenizer.json with what the files beside it add."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Pipeline

from serve_app.core.errors import ConfigError
from serve_app.text.parts import TokenizerParts
from serve_app.text.vocabulary import Spelling

_NAMED = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


def load_hf_parts(folder: Path) -> TokenizerParts:
    """Build the tokenizer of a folder. ConfigError where tokenizer.json is missing or unknown."""
    pipeline = _read_pipeline(folder)
    settings = _read_json(folder / "tokenizer_config.json")
    added_tokens = _added_tokens(pipeline, settings)
    spelling, strips_leading_space = _spelling(pipeline, folder)
    named = _named_tokens(folder, settings)
    model_id_limit = max(pipeline.get_vocab(with_added_tokens=False).values(), default=-1) + 1
    ids = _ids_by_name(pipeline, added_tokens, named)
    prefix, suffix = _surrounding(pipeline)
    if str(settings.get("tokenizer_class")).startswith("Llama"):
        prefix = _as_declared(settings.get("add_bos_token"), ids.get("bos_token"), prefix)
        suffix = _as_declared(settings.get("add_eos_token"), ids.get("eos_token"), suffix)
    return TokenizerParts(
        pipeline=pipeline,
        added_tokens=added_tokens,
        spelling=spelling,
        strips_leading_space=strips_leading_space,
        vocab_size=max([model_id_limit, *(token_id + 1 for token_id in added_tokens)]),
        model_id_limit=model_id_limit,
        bos_token_id=ids.get("bos_token"),
        eos_token_ids=_end_ids(folder, ids.get("eos_token")),
        prefix_ids=prefix,
        suffix_ids=suffix,
        named_tokens=named,
        chat_template=_chat_template(folder, settings),
    )


def _error(folder: Path, text: str) -> ConfigError:
    return ConfigError(f"model.path: {folder.name}: {text}", param="model.path")


def _read_pipeline(folder: Path) -> Pipeline:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise _error(folder, "there is no tokenizer.json; save the tokenizer in its fast form")
    try:
        return Pipeline.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise _error(folder, f"tokenizer.json cannot be read: {error}") from None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _error(path.parent, f"{path.name} cannot be read: {error}") from None
    return content if isinstance(content, dict) else {}


def _added_tokens(pipeline: Pipeline, settings: dict[str, Any]) -> dict[int, AddedToken]:
    """Tokens of tokenizer.json; those that tokenizer_config.json alone declares come on top."""
    tokens: dict[int, AddedToken] = dict(pipeline.get_added_tokens_decoder())
    for token_id, fields in (settings.get("added_tokens_decoder") or {}).items():
        if int(token_id) in tokens:
            continue
        flags = {
            name: bool(fields.get(name, False))
            for name in ("single_word", "lstrip", "rstrip", "normalized", "special")
        }
        tokens[int(token_id)] = AddedToken(fields["content"], **flags)
    return dict(sorted(tokens.items()))


def _spelling(pipeline: Pipeline, folder: Path) -> tuple[Spelling, bool]:
    """Tell from the decoder how tokens spell bytes, and whether it drops a space in front."""
    decoder = pipeline.decoder
    steps = [] if decoder is None else _flatten(json.loads(decoder.__getstate__()))
    kinds = {step["type"] for step in steps}
    if not kinds:
        return Spelling.WORDS, True
    if kinds <= {"ByteLevel", "Fuse"}:
        return Spelling.BYTE_LEVEL, False
    if kinds <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}:
        return Spelling.SENTENCEPIECE, any(map(_is_stripping, steps))
    raise _error(
        folder,
        f"tokenizer.json has the decoder {'+'.join(sorted(kinds))}, which is not supported;"
        " byte-level and SentencePiece vocabularies are",
    )


def _flatten(decoder: dict[str, Any]) -> list[dict[str, Any]]:
    if decoder["type"] == "Sequence":
        return [step for inner in decoder["decoders"] for step in _flatten(inner)]
    return [decoder]


def _is_stripping(step: dict[str, Any]) -> bool:
    if step["type"] == "Metaspace":
        return bool(step.get("prepend_scheme", "always") != "never")
    return bool(step["type"] == "Strip" and step.get("start", 0) > 0)


def _surrounding(pipeline: Pipeline) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What the post-processor puts in front of a text and behind it."""
    bare = pipeline.encode("a", add_special_tokens=False).ids
    full = pipeline.encode("a", add_special_tokens=True).ids
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return tuple(full[:start]), tuple(full[start + len(bare) :])
    return (), ()


def _as_declared(
    declared: bool | None, token_id: int | None, found: tuple[int, ...]
) -> tuple[int, ...]:
    """What tokenizer_config.json says goes before the post-processor, for the Llama classes.

    DeepSeek's folders declare their BOS this way alone.
    """
    if declared is None or token_id is None:
        return found
    return (token_id,) if declared else ()


def _named_tokens(folder: Path, settings: dict[str, Any]) -> dict[str, str]:
    declared = {**_read_json(folder / "special_tokens_map.json"), **settings}
    return {
        name: value["content"] if isinstance(value, dict) else value
        for name in _NAMED
        if (value := declared.get(name))
    }


def _ids_by_name(
    pipeline: Pipeline, added_tokens: dict[int, AddedToken], named: dict[str, str]
) -> dict[str, int]:
    ids = {token.content: token_id for token_id, token in added_tokens.items()}
    found = {name: ids.get(text, pipeline.token_to_id(text)) for name, text in named.items()}
    return {name: token_id for name, token_id in found.items() if token_id is not None}


def _end_ids(folder: Path, eos_token_id: int | None) -> tuple[int, ...]:
    """generation_config.json's, else config.json's; the tokenizer's own always."""
    for name in ("generation_config.json", "config.json"):
        declared = _read_json(folder / name).get("eos_token_id")
        if declared is not None:
            ids = declared if isinstance(declared, list) else [declared]
            break
    else:
        ids = []
    if eos_token_id is not None:
        ids = [*ids, eos_token_id]
    return tuple(dict.fromkeys(int(token_id) for token_id in ids))


def _chat_template(folder: Path, settings: dict[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, each with a name
        by_name = {entry["name"]: entry["template"] for entry in template}
        return by_name.get("default") or next(iter(by_name.values()), None)
    return template or _read_json(folder / "chat_template.json").get("chat_template")
