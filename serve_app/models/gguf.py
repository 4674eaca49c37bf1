"""Reader of GGUF files, version 2 and 3, little-endian. Needs numpy only.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Every length in the file is
checked against the bytes that are left, so a truncated or hostile file gives one ConfigError.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from serve_app.core.errors import ConfigError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_DIMS = 4
_DEFAULT_ALIGNMENT = 32
_MIN_TENSOR_INFO_BYTES = 8 + 4 + 8 + 4 + 8
_MIN_KEY_VALUE_BYTES = 8 + 4 + 1
_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS: dict[int, struct.Struct] = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<?"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}


class GGMLType(IntEnum):
    """How a tensor's elements are stored: the type numbers of ggml."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q8_1 = 9
    Q2_K = 10
    Q3_K = 11
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    Q8_K = 15
    IQ2_XXS = 16
    IQ2_XS = 17
    IQ3_XXS = 18
    IQ1_S = 19
    IQ4_NL = 20
    IQ3_S = 21
    IQ2_S = 22
    IQ4_XS = 23
    I8 = 24
    I16 = 25
    I32 = 26
    I64 = 27
    F64 = 28
    IQ1_M = 29
    BF16 = 30
    TQ1_0 = 34
    TQ2_0 = 35
    MXFP4 = 39


BLOCK_LAYOUT: dict[GGMLType, tuple[int, int]] = {
    GGMLType.F32: (1, 4),
    GGMLType.F16: (1, 2),
    GGMLType.BF16: (1, 2),
    GGMLType.F64: (1, 8),
    GGMLType.I8: (1, 1),
    GGMLType.I16: (1, 2),
    GGMLType.I32: (1, 4),
    GGMLType.I64: (1, 8),
    GGMLType.Q4_0: (32, 18),
    GGMLType.Q4_1: (32, 20),
    GGMLType.Q5_0: (32, 22),
    GGMLType.Q5_1: (32, 24),
    GGMLType.Q8_0: (32, 34),
    GGMLType.Q8_1: (32, 36),
    GGMLType.IQ4_NL: (32, 18),
    GGMLType.MXFP4: (32, 17),
    GGMLType.Q2_K: (256, 84),
    GGMLType.Q3_K: (256, 110),
    GGMLType.Q4_K: (256, 144),
    GGMLType.Q5_K: (256, 176),
    GGMLType.Q6_K: (256, 210),
    GGMLType.Q8_K: (256, 292),
    GGMLType.IQ2_XXS: (256, 66),
    GGMLType.IQ2_XS: (256, 74),
    GGMLType.IQ2_S: (256, 82),
    GGMLType.IQ3_XXS: (256, 98),
    GGMLType.IQ3_S: (256, 110),
    GGMLType.IQ1_S: (256, 50),
    GGMLType.IQ1_M: (256, 56),
    GGMLType.IQ4_XS: (256, 136),
    GGMLType.TQ1_0: (256, 54),
    GGMLType.TQ2_0: (256, 66),
}
"""Elements per block and bytes per block of each type."""


@dataclass(frozen=True, slots=True)
class GGUFTensorInfo:
    """Where a tensor lies: `shape` rows-first (torch order), `offset` from the file's start."""

    name: str
    shape: tuple[int, ...]
    ggml_type: GGMLType
    offset: int
    nbytes: int


class GGUFFile:
    """A memory-mapped GGUF file.

    `metadata` maps keys to str, int, float, bool, a list of str, or a numpy array (numeric arrays).
    Raises ConfigError, one line, if the file is missing, truncated or malformed.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        # Copy-on-write: the file stays untouched, and torch accepts the array without a warning.
        try:
            with self.path.open("rb") as file:
                self._mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"model.path: cannot read {self.path.name}: {_reason(self.path, error)}",
                param="model.path",
            ) from None
        self._bytes: npt.NDArray[np.uint8] = np.frombuffer(self._mapping, dtype=np.uint8)
        reader = _Reader(self._bytes, self.path.name)
        num_tensors, num_entries = reader.header()
        self.metadata: Mapping[str, Any] = reader.metadata(num_entries)
        self.tensors: Mapping[str, GGUFTensorInfo] = reader.tensor_infos(
            num_tensors, _alignment(self.metadata, reader)
        )

    def data(self, name: str) -> npt.NDArray[np.uint8]:
        """The bytes of tensor `name`, a uint8 view of the mapping. Raises KeyError if absent."""
        return self.bytes_of(self.tensors[name])

    def bytes_of(self, info: GGUFTensorInfo) -> npt.NDArray[np.uint8]:
        """The bytes of a tensor, or of a part of one, a uint8 view of the mapping."""
        return self._bytes[info.offset : info.offset + info.nbytes]

    def release_pages(self) -> None:
        """Give back the memory of all pages read so far; what is read again comes from the file."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._mapping.madvise(mmap.MADV_DONTNEED)


def _reason(path: Path, error: OSError | ValueError) -> str:
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return "the file is empty" if path.stat().st_size == 0 else str(error)


def _alignment(metadata: Mapping[str, Any], reader: _Reader) -> int:
    value = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if not isinstance(value, int) or value < 8 or value % 8:
        raise reader.malformed(f"general.alignment is {value!r}, not a multiple of 8")
    return value


class _Reader:
    """Reads the header front to back; each read is bounded by the bytes left."""

    def __init__(self, data: npt.NDArray[np.uint8], file_name: str) -> None:
        self._bytes = data.data
        self._size = len(self._bytes)
        self._position = 0
        self._file_name = file_name

    def malformed(self, what: str) -> ConfigError:
        """The error for a file that breaks the format."""
        return ConfigError(
            f"model.path: {self._file_name} is not a valid GGUF file: {what};"
            " copy or convert it again",
            param="model.path",
        )

    def header(self) -> tuple[int, int]:
        """Return the number of tensors and of metadata entries."""
        if bytes(self._take(4)) != _MAGIC:
            raise self.malformed("it does not begin with GGUF")
        version = self._scalar(4)
        if version not in _VERSIONS:
            big_endian = int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS
            what = (
                "it is big-endian" if big_endian else f"version {version} is unknown (2 and 3 are)"
            )
            raise self.malformed(what)
        num_tensors, num_entries = self._scalar(10), self._scalar(10)
        self._check_count(num_tensors, _MIN_TENSOR_INFO_BYTES, "tensors")
        self._check_count(num_entries, _MIN_KEY_VALUE_BYTES, "metadata entries")
        return num_tensors, num_entries

    def metadata(self, num_entries: int) -> dict[str, Any]:
        """Read all key-value pairs."""
        entries: dict[str, Any] = {}
        for _ in range(num_entries):
            key = self._string()
            if key in entries:
                raise self.malformed(f"the key {key[:80]!r} occurs twice")
            entries[key] = self._value(self._scalar(4))
        return entries

    def tensor_infos(self, num_tensors: int, alignment: int) -> dict[str, GGUFTensorInfo]:
        """Read the tensor table; offsets in the file count from the aligned end of this table."""
        rows = [self._tensor_row() for _ in range(num_tensors)]
        base = -(-self._position // alignment) * alignment
        infos: dict[str, GGUFTensorInfo] = {}
        for name, shape, type_number, relative in rows:
            if name in infos:
                raise self.malformed(f"the tensor {name[:80]!r} occurs twice")
            if relative % alignment:
                raise self.malformed(f"tensor {name[:80]!r} is not aligned to {alignment} bytes")
            ggml_type, nbytes = self._storage(name, shape, type_number)
            offset = base + relative
            if offset + nbytes > self._size:
                raise self._truncated(f"tensor {name[:80]!r} ends at byte {offset + nbytes}")
            infos[name] = GGUFTensorInfo(name, shape, ggml_type, offset, nbytes)
        return infos

    def _tensor_row(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        num_dims = self._scalar(4)
        if not 1 <= num_dims <= _MAX_DIMS:
            raise self.malformed(f"tensor {name[:80]!r} has {num_dims} dimensions")
        dims = tuple(self._scalar(10) for _ in range(num_dims))
        return name, dims[::-1], self._scalar(4), self._scalar(10)

    def _storage(self, name: str, shape: tuple[int, ...], type_number: int) -> tuple[GGMLType, int]:
        try:
            ggml_type = GGMLType(type_number)
        except ValueError:
            raise self.malformed(
                f"tensor {name[:80]!r} has the unknown type {type_number}"
            ) from None
        block, block_bytes = BLOCK_LAYOUT[ggml_type]
        if 0 in shape or shape[-1] % block:
            raise self.malformed(f"tensor {name[:80]!r} of {ggml_type.name} has the shape {shape}")
        return ggml_type, math.prod(shape) // block * block_bytes

    def _value(self, value_type: int) -> Any:
        if value_type == _STRING:
            return self._string()
        if value_type == _ARRAY:
            return self._array()
        return self._scalar(value_type)

    def _array(self) -> list[str] | npt.NDArray[Any]:
        item_type, count = self._scalar(4), self._scalar(10)
        if item_type == _STRING:
            self._check_count(count, 8, "strings")
            return self._strings(count)
        layout = self._layout(item_type)
        self._check_count(count, layout.size, "array items")
        dtype = np.dtype(bool if item_type == _BOOL else layout.format)
        return np.frombuffer(self._take(count * layout.size), dtype=dtype).copy()

    def _layout(self, value_type: int) -> struct.Struct:
        layout = _SCALARS.get(value_type)
        if layout is None:
            raise self.malformed(f"the value type {value_type} at byte {self._position} is unknown")
        return layout

    def _scalar(self, value_type: int) -> Any:
        layout = self._layout(value_type)
        return layout.unpack(self._take(layout.size))[0]

    def _string(self) -> str:
        # Surrogates keep bytes that are no UTF-8: nothing is lost, and readers can tell.
        return bytes(self._take(self._scalar(10))).decode("utf-8", errors="surrogateescape")

    def _strings(self, count: int) -> list[str]:
        """`count` strings; a vocabulary has 100,000, so without a call per string."""
        data, position, size = self._bytes, self._position, self._size
        unpack = _SCALARS[10].unpack_from
        strings = []
        for _ in range(count):
            start = position + 8
            position = start + unpack(data, position)[0] if start <= size else start
            if position > size:
                raise self._truncated(f"a list of strings asks for byte {position}")
            strings.append(str(data[start:position], "utf-8", "surrogateescape"))
        self._position = position
        return strings

    def _take(self, num_bytes: int) -> memoryview:
        end = self._position + num_bytes
        if end > self._size:
            raise self._truncated(f"the header asks for byte {end}")
        taken = self._bytes[self._position : end]
        self._position = end
        return taken

    def _check_count(self, count: int, min_bytes: int, what: str) -> None:
        if count * min_bytes > self._size - self._position:
            raise self._truncated(f"it announces {count} {what}")

    def _truncated(self, what: str) -> ConfigError:
        return ConfigError(
            f"model.path: {self._file_name} is truncated or damaged: {what}, but the file has"
            f" {self._size} bytes; copy it again",
            param="model.path",
        )
