"""A list of calls to the compiled CPU operators, made from C++: `cpu_calls.cpp`."""

from __future__ import annotations

import ctypes
import enum
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from serve_app.models.kernels.cpu_library import load_library

_SOURCE = Path(__file__).with_name("cpu_calls.cpp")
_NUM_ARGS = 18
_FIRST_ARG = 2


class CallKind(enum.IntEnum):
    """What a call's function is, which says how its arguments are passed."""

    ADD_RMS_NORM = 0
    SILU_AND_MUL = 1
    ROTATE_AND_CACHE = 2
    DECODE_ATTENTION = 3
    PACKED_LINEAR = 4


class CallTable:
    """Calls in their order, made by one team of threads. Arguments are numbers and addresses; who
    adds them keeps them alive.

    A call is a row of int64: kind, address of the function, arguments in the order of its C
    declaration but without the team's member, and without its float, which comes last.
    """

    def __init__(self, library: ctypes.CDLL, num_threads: int) -> None:
        self._run = library.run_calls
        self._num_threads = num_threads
        self._rows: list[npt.NDArray[np.int64]] = []
        self._table: npt.NDArray[np.int64] = np.zeros((0, 0), np.int64)
        self._kinds: list[CallKind] = []

    def add(
        self, kind: CallKind, function: Any, arguments: Sequence[int | None], number: float = 0.0
    ) -> None:
        """Append a call of a ctypes function; None is a null pointer."""
        row = np.zeros(_FIRST_ARG + _NUM_ARGS + 1, np.int64)
        address = ctypes.cast(function, ctypes.c_void_p).value
        assert address is not None
        row[:_FIRST_ARG] = kind, address
        row[_FIRST_ARG : _FIRST_ARG + len(arguments)] = [each or 0 for each in arguments]
        row[-1:].view(np.float64)[0] = number
        self._rows.append(row)
        self._kinds.append(kind)

    def finish(self) -> None:
        """Lay the calls out; none is added after that."""
        self._table = np.stack(self._rows)

    def column(self, kind: CallKind, argument: int) -> Column:
        """One argument of all calls of a kind."""
        calls = [index for index, each in enumerate(self._kinds) if each is kind]
        return Column(self._table, np.array(calls), _FIRST_ARG + argument)

    def cell(self, call: int, argument: int) -> Column:
        """One argument of one call; -1 is the last."""
        return Column(self._table, np.array([call]), _FIRST_ARG + argument)

    def run(self) -> None:
        """Make the calls."""
        self._run(self._table.ctypes.data, len(self._table), self._num_threads)


class Column:
    """An argument that changes from run to run."""

    __slots__ = ("_column", "_rows", "_table")

    def __init__(
        self, table: npt.NDArray[np.int64], rows: npt.NDArray[np.intp], column: int
    ) -> None:
        self._table = table
        self._rows = rows
        self._column = column

    def set(self, value: int) -> None:
        """Pass `value` from now on."""
        self._table[self._rows, self._column] = value


@functools.cache
def calls_library() -> ctypes.CDLL | None:
    """The compiled source, or None where there is none."""
    library = load_library(_SOURCE)
    if library is not None:
        library.run_calls.restype = None
        library.run_calls.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
    return library
