from __future__ import annotations

import struct

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.core.errors import ConfigError
from serve_app.models.gguf import BLOCK_LAYOUT, GGMLType, GGUFFile


def write_file(path, tensors=(), **extra):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("a.uint", 7)
    writer.add_int64("a.negative", -5)
    writer.add_float32("a.float", 0.5)
    writer.add_bool("a.bool", True)
    writer.add_string("a.text", "Grüße\n")
    writer.add_array("a.words", ["one", "", "drei ✓"])
    writer.add_array("a.numbers", [3, 1, 2])
    writer.add_array("a.flags", [True, False])
    for key, value in extra.items():
        writer.add_uint32(key, value)
    for name, values in tensors:
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def file_bytes(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "a.gguf"
    write_file(path, [("w", np.arange(12, dtype=np.float32).reshape(3, 4))])
    return path.read_bytes()


def open_bytes(tmp_path, data):
    path = tmp_path / "b.gguf"
    path.write_bytes(data)
    return GGUFFile(path)


def assert_one_line(error):
    assert "\n" not in str(error.value)
    assert "b.gguf" in str(error.value)
    assert error.value.param == "model.path"


def test_metadata_of_each_type(tmp_path, file_bytes):
    metadata = open_bytes(tmp_path, file_bytes).metadata
    assert metadata["general.architecture"] == "llama"
    assert metadata["a.uint"] == 7
    assert metadata["a.negative"] == -5
    assert metadata["a.float"] == 0.5
    assert metadata["a.bool"] is True
    assert metadata["a.text"] == "Grüße\n"
    assert metadata["a.words"] == ["one", "", "drei ✓"]
    assert metadata["a.numbers"].tolist() == [3, 1, 2]
    assert metadata["a.flags"].tolist() == [True, False]


def test_tensors_are_views_in_rows_first_order(tmp_path):
    first = np.arange(12, dtype=np.float32).reshape(3, 4)
    second = np.arange(5, dtype=np.float16)
    path = write_file(tmp_path / "a.gguf", [("first", first), ("second", second)])
    file = GGUFFile(path)
    info = file.tensors["first"]
    assert (info.shape, info.ggml_type, info.nbytes) == ((3, 4), GGMLType.F32, 48)
    assert np.array_equal(file.data("first").view(np.float32).reshape(3, 4), first)
    assert np.array_equal(file.data("second").view(np.float16), second)
    assert file.data("first").base is not None


def test_block_layouts_are_those_of_the_gguf_package():
    theirs = {kind.name: sizes for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
    ours = {kind.name: sizes for kind, sizes in BLOCK_LAYOUT.items() if kind.name != "Q8_1"}
    assert ours == {name: theirs[name] for name in ours if name in theirs}
    assert len(set(ours) & set(theirs)) >= 28


def test_bad_magic(tmp_path):
    with pytest.raises(ConfigError, match="does not begin with GGUF") as error:
        open_bytes(tmp_path, b"PK\x03\x04" + bytes(100))
    assert_one_line(error)


@pytest.mark.parametrize(
    ("version", "message"),
    [(1, "version 1"), (99, "version 99"), (3 << 24, "big-endian")],
)
def test_unknown_version(tmp_path, file_bytes, version, message):
    with pytest.raises(ConfigError, match=message) as error:
        open_bytes(tmp_path, b"GGUF" + struct.pack("<I", version) + file_bytes[8:])
    assert_one_line(error)


def test_version_2_is_read(tmp_path, file_bytes):
    file = open_bytes(tmp_path, b"GGUF" + struct.pack("<I", 2) + file_bytes[8:])
    assert set(file.tensors) == {"w"}


def test_missing_and_empty_file(tmp_path):
    with pytest.raises(ConfigError, match="No such file") as error:
        GGUFFile(tmp_path / "b.gguf")
    assert_one_line(error)
    with pytest.raises(ConfigError, match="the file is empty") as error:
        open_bytes(tmp_path, b"")
    assert_one_line(error)


def test_every_truncation_is_one_clear_line(tmp_path, file_bytes):
    # The writer pads the data's end to the alignment; what counts ends with the tensor.
    file = open_bytes(tmp_path, file_bytes)
    end = file.tensors["w"].offset + file.tensors["w"].nbytes
    for length in range(1, end):
        with pytest.raises(ConfigError) as error:
            open_bytes(tmp_path, file_bytes[:length])
        assert_one_line(error)


@settings(max_examples=200, deadline=None)
@given(position=st.integers(4, 600), value=st.integers(0, 255))
def test_a_changed_byte_gives_a_file_or_one_line(tmp_path_factory, file_bytes, position, value):
    data = bytearray(file_bytes)
    data[position % len(data)] = value
    path = tmp_path_factory.mktemp("changed") / "b.gguf"
    path.write_bytes(data)
    outcome = read_or_explain(path)
    if isinstance(outcome, str):
        assert "\n" not in outcome
    else:
        for name, info in outcome.tensors.items():
            assert outcome.data(name).nbytes == info.nbytes


def read_or_explain(path):
    try:
        return GGUFFile(path)
    except ConfigError as error:
        return str(error)


def test_huge_counts_are_refused_before_they_are_read(tmp_path, file_bytes):
    for offset in (8, 16):
        data = bytearray(file_bytes)
        data[offset : offset + 8] = struct.pack("<Q", 1 << 62)
        with pytest.raises(ConfigError, match="announces") as error:
            open_bytes(tmp_path, bytes(data))
        assert_one_line(error)
