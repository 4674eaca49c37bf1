"""A GGUF file as a folder that XeRay and transformers read alike."""

from __future__ import annotations

import json

import pytest
import torch

from serve_app.config.model_source import ModelFormat, ModelSource, resolve_model
from serve_app.config.schema import ModelSection
from serve_app.quantize.scoring import open_scorer
from serve_app.quantize.source import export_gguf, write_tokenizer
from serve_app.text.hf_vocabulary import load_hf_parts
from serve_app.text.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    source = resolve_model(ModelSection())
    folder = tmp_path_factory.mktemp("exported") / "model"
    export_gguf(source.path, folder)
    return source, folder


def test_the_exported_folder_computes_what_the_file_does(exported):
    source, folder = exported
    ids = torch.tensor(load_tokenizer(source).encode("The sea was", add_special_tokens=True))
    file, written = (
        open_scorer(path, "native", device="cpu", dtype="float32").logits(ids)
        for path in (source.path, folder)
    )
    assert torch.cosine_similarity(file, written, dim=-1).min() > 0.999
    assert file[-1].argmax() == written[-1].argmax()


def test_its_tokenizer_is_the_files(exported):
    source, folder = exported
    ours = load_tokenizer(source)
    theirs = load_tokenizer(ModelSource("x", folder, ModelFormat.HUGGING_FACE))
    text = "Hello wörld 42 <|im_start|> ☃\n\n\tend"
    for is_parsing in (False, True):
        assert ours.encode(text, add_special_tokens=True, parse_special=is_parsing) == (
            theirs.encode(text, add_special_tokens=True, parse_special=is_parsing)
        )
    assert theirs.chat_template == ours.chat_template
    assert theirs.special_tokens == ours.special_tokens
    assert set(theirs.eos_token_ids) == set(ours.eos_token_ids)


def test_a_prefix_survives_in_the_written_tokenizer(tiny_folder, tmp_path):
    from dataclasses import replace

    parts = replace(load_hf_parts(tiny_folder), prefix_ids=(0,), chat_template="{{ messages }}")
    write_tokenizer(parts, tmp_path, 64)
    tokenizer = load_tokenizer(ModelSource("x", tmp_path, ModelFormat.HUGGING_FACE))
    assert tokenizer.encode("Alice", add_special_tokens=True)[0] == 0
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings["chat_template"] == "{{ messages }}"
