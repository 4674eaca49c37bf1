from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from serve_app.config.model_source import ModelFormat, ModelSource
from serve_app.config.schema import ModelSection
from serve_app.core.errors import ConfigError
from serve_app.models.embedding_config import EmbeddingConfig, embedding_config

POOLING_FLAGS = ("cls_token", "mean_tokens", "max_tokens", "lasttoken")


def write(path: Path, values: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(values))


@pytest.fixture
def source(tmp_path: Path) -> ModelSource:
    write(tmp_path / "config.json", {"model_type": "qwen3", "hidden_size": 64})
    return ModelSource("tiny", tmp_path, ModelFormat.HUGGING_FACE)


def add_modules(source: ModelSource, *kinds: str, **pooling: Any) -> None:
    """Make the folder one of sentence-transformers."""
    folders = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
    modules = [
        {"idx": i, "type": f"sentence_transformers.models.{kind}", "path": folders.get(kind, "x")}
        for i, kind in enumerate(kinds)
    ]
    write(source.path / "modules.json", modules)
    flags = {f"pooling_mode_{name}": False for name in POOLING_FLAGS}
    write(source.path / "1_Pooling" / "config.json", {**flags, **pooling})


def test_a_plain_folder_generates_unless_the_config_says_otherwise(source):
    assert embedding_config(ModelSection(), source) is None
    made = embedding_config(ModelSection(task="embed"), source)
    assert made == EmbeddingConfig("last", True, 64)


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        ({"pooling_mode_lasttoken": True}, "last"),
        ({"pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode_cls_token": True}, "cls"),
        ({"pooling_mode": "mean"}, "mean"),
    ],
)
def test_a_folder_of_sentence_transformers_says_how_it_pools(source, pooling, expected):
    add_modules(source, "Transformer", "Pooling", "Normalize", **pooling)
    assert embedding_config(ModelSection(), source) == EmbeddingConfig(expected, True, 64)
    assert embedding_config(ModelSection(task="generate"), source) is None


def test_what_the_folder_leaves_out_and_the_config_sets(source):
    add_modules(source, "Transformer", "Pooling", pooling_mode_max_tokens=True)
    write(source.path / "sentence_bert_config.json", {"max_seq_length": 512})
    write(
        source.path / "config.json",
        {"hidden_size": 32, "matryoshka_dimensions": [8, 16]},
    )
    section = ModelSection.model_validate({"embedding": {"pooling": "mean"}})
    assert embedding_config(section, source) == EmbeddingConfig("mean", False, 32, True, 512)
    strict = {"pooling": "cls", "normalize": True, "allow_dimensions": False}
    section = ModelSection.model_validate({"embedding": strict})
    assert embedding_config(section, source) == EmbeddingConfig("cls", True, 32, False, 512)


@pytest.mark.parametrize(
    ("kinds", "pooling", "words"),
    [
        (("Transformer", "Pooling", "Dense"), {"pooling_mode_cls_token": True}, "Dense"),
        (("Transformer",), {}, "names no folder of a Pooling module"),
        (("Transformer", "Pooling"), {"pooling_mode_max_tokens": True}, "pooling_mode_max_tokens"),
        (("Transformer", "Pooling"), {}, "asks for nothing"),
        (
            ("Transformer", "Pooling"),
            {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True},
            "pooling_mode_cls_token, pooling_mode_mean_tokens",
        ),
    ],
)
def test_what_is_not_known_is_named(source, kinds, pooling, words):
    add_modules(source, *kinds, **pooling)
    with pytest.raises(ConfigError, match=words) as caught:
        embedding_config(ModelSection(), source)
    assert "model.task: generate" in caught.value.message


@pytest.mark.parametrize("text", ["{", '{"type": 1}', "[1]", '[{"path": ""}]'])
def test_unreadable_modules_are_one_line(source, text):
    (source.path / "modules.json").write_text(text)
    with pytest.raises(ConfigError, match=r"modules\.json"):
        embedding_config(ModelSection(), source)


def test_a_pooling_folder_outside_of_the_model_is_refused(source):
    add_modules(source, "Transformer", "Pooling", pooling_mode_cls_token=True)
    modules = [{"type": "sentence_transformers.models.Pooling", "path": "../../etc"}]
    write(source.path / "modules.json", modules)
    with pytest.raises(ConfigError, match="names no folder"):
        embedding_config(ModelSection(), source)


@pytest.mark.parametrize(("kind", "expected"), [(1, "mean"), (2, "cls"), (3, "last"), (4, None)])
def test_gguf_says_it_by_a_number(tmp_path, kind, expected):
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_uint32("qwen3.pooling_type", kind)
    writer.add_embedding_length(48)
    writer.add_tensor("token_embd.weight", np.zeros((2, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    made = embedding_config(ModelSection(), ModelSource("tiny", path, ModelFormat.GGUF))
    assert made == (None if expected is None else EmbeddingConfig(expected, True, 48))
