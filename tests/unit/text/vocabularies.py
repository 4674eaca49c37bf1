"""Small vocabularies, written out as GGUF metadata or as a Hugging Face folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Pipeline
from tokenizers import models, pre_tokenizers, trainers
from tokenizers.decoders import ByteLevel

from serve_app.text.gguf_vocabulary import TokenType, parts_from_metadata
from serve_app.text.tokenizer import Tokenizer
from serve_app.text.vocabulary import byte_level_alphabet

R1_SPECIALS = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>")
R1_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ m['content'] }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}{% endif %}"
    "{% if m['role'] == 'assistant' %}{% set content = m['content'] %}"
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ '<｜Assistant｜>' + content.strip() + '<｜end▁of▁sentence｜>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"
)
CORPUS = [
    "the cat sat on the mat; 1984 and 2024! It's 日本語 and naïve café.",
    "aaaa bbbb \n\n\n  x",
]


def gguf_metadata(pre: str = "qwen2", **changes: Any) -> dict[str, Any]:
    """Byte-level metadata with R1's special tokens; `changes` override keys, None removes one."""
    trained = train_byte_level()
    tokens = trained["tokens"]
    first = len(tokens)
    tokens = [*tokens, *R1_SPECIALS, "<think>", "</think>"]
    types = [TokenType.NORMAL] * first + [TokenType.CONTROL] * len(R1_SPECIALS)
    types += [TokenType.USER_DEFINED] * 2
    metadata = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": types,
        "merges": trained["merges"],
        "bos_token_id": first,
        "eos_token_id": first + 1,
        "add_bos_token": True,
        **changes,
    }
    entries = {f"tokenizer.ggml.{k}": v for k, v in metadata.items() if v is not None}
    return {**entries, "tokenizer.chat_template": R1_TEMPLATE}


def gguf_tokenizer(pre: str = "qwen2", **changes: Any) -> Tokenizer:
    return Tokenizer(parts_from_metadata(gguf_metadata(pre, **changes), "small.gguf"))


def train_byte_level() -> dict[str, list[str]]:
    pipeline = Pipeline(models.BPE())
    pipeline.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=360, initial_alphabet=sorted(byte_level_alphabet()), show_progress=False
    )
    pipeline.train_from_iterator(CORPUS * 4, trainer)
    model = json.loads(pipeline.to_str())["model"]
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    return {"tokens": sorted(model["vocab"], key=model["vocab"].__getitem__), "merges": merges}


def write_hf_folder(folder: Path, *, special: tuple[str, ...] = R1_SPECIALS) -> None:
    """A byte-level tokenizer.json whose added tokens lie past the model's vocabulary."""
    trained = train_byte_level()
    vocabulary = {token: index for index, token in enumerate(trained["tokens"])}
    pairs = [tuple(merge.split(" ")) for merge in trained["merges"]]
    pipeline = Pipeline(models.BPE(vocabulary, pairs))
    pipeline.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pipeline.decoder = ByteLevel()
    pipeline.add_tokens(["<think>", "</think>"])
    pipeline.add_special_tokens(list(special))
    pipeline.save(str(folder / "tokenizer.json"))
    settings = {
        "bos_token": special[0],
        "eos_token": {"__type": "AddedToken", "content": special[1]},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(R1_TEMPLATE)
    (folder / "config.json").write_text("{}")
