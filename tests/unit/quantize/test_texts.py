"""Texts as windows of token ids."""

from __future__ import annotations

import json

import pytest
import torch

from serve_app.config.model_source import ModelFormat, ModelSource
from serve_app.core.errors import ConfigError
from serve_app.quantize.texts import (
    CALIBRATION_TEXT,
    EVALUATION_TEXT,
    bundled_text,
    read_texts,
    windows,
)
from serve_app.text.tokenizer import load_tokenizer


@pytest.fixture
def tokenizer(tiny_folder):
    return load_tokenizer(ModelSource("tiny", tiny_folder, ModelFormat.HUGGING_FACE))


def test_the_bundled_texts_are_the_books_alone():
    for name, begins in ((EVALUATION_TEXT, "The Time Traveller"), (CALIBRATION_TEXT, "Alice was")):
        text = bundled_text(name)
        assert text.startswith(begins)
        assert 140_000 < len(text.encode()) < 300_000
        assert "Gutenberg" not in text


def test_windows_are_the_text_in_order_or_spread_over_it(tokenizer):
    text = bundled_text(CALIBRATION_TEXT)[:4000]
    ids = tokenizer.encode(text, add_special_tokens=False)
    whole = windows([text], tokenizer, 16)
    assert whole.flatten().tolist() == ids[: len(whole) * 16]
    few = windows([text], tokenizer, 16, 3)
    assert few.dtype == torch.int64
    assert [row.tolist() for row in few] == [
        whole[index * len(whole) // 3].tolist() for index in range(3)
    ]


def test_a_text_too_short_is_an_error(tokenizer):
    with pytest.raises(ConfigError, match="name a longer text"):
        windows(["Alice"], tokenizer, 64)


def test_jsonl_gives_a_text_per_line(tmp_path):
    path = tmp_path / "sample.jsonl"
    lines = [
        {"text": "one"},
        {"prompt": "two", "completion": " three"},
        {"messages": [{"role": "user", "content": "four"}, {"role": "x", "content": "five"}]},
    ]
    path.write_text("\n\n".join(json.dumps(line) for line in lines))
    assert read_texts(path, "--calibration") == ["one", "two three", "four\n\nfive"]


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "line 1 is no JSON"), ('{"a": 1}', "line 1 has neither"), ("[]", "line 1 has neither")],
)
def test_a_bad_line_is_named(tmp_path, content, message):
    path = tmp_path / "sample.jsonl"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_texts(path, "--calibration")


def test_a_file_that_is_no_text_is_named(tmp_path):
    path = tmp_path / "sample.txt"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"cannot read .*sample.txt: it is no UTF-8 text"):
        read_texts(path, "--text")
    with pytest.raises(ConfigError, match="No such file"):
        read_texts(tmp_path / "none.txt", "--text")
