"""Counters of the kernel's perf subsystem that belong to a part of the chip, not to a program.

Format of the attributes and of a reading: perf_event_open(2); struct perf_event_attr, version 0.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
from typing import Protocol

_SYSCALLS = {"x86_64": 298}
_ATTRIBUTES = struct.Struct("=IIQQQQQIIQ")
_READING = struct.Struct("=QQQ")
_READ_TIMES = 0b11  # with the time that it was enabled, and that it ran
_CLOEXEC = 1 << 3
_ALL_PROCESSES, _NO_GROUP = -1, -1


class Counter(Protocol):
    """A number that only grows."""

    def read(self) -> int:
        """Return the count so far."""
        ...

    def close(self) -> None:
        """Give the counter back."""
        ...


class PerfCounter:
    """One event of one unit, over all processes, counted from now on.

    Args:
        kind: the unit's number, `type` in its folder of sysfs.
        config: the event, as the unit's `format` lays it out.
        cpu: of which socket; one of the unit's `cpumask`.

    Raises OSError: without the right (CAP_PERFMON, or kernel.perf_event_paranoid at most 0), on
    another processor than x86-64, or where the unit does not know the event.
    """

    def __init__(self, kind: int, config: int, cpu: int) -> None:
        number = _SYSCALLS.get(platform.machine())
        if number is None:
            raise OSError("perf counters are read on x86-64 only")
        attributes = _ATTRIBUTES.pack(kind, _ATTRIBUTES.size, config, 0, 0, _READ_TIMES, 0, 0, 0, 0)
        libc = ctypes.CDLL(None, use_errno=True)
        self._descriptor: int = libc.syscall(
            ctypes.c_long(number),
            ctypes.c_char_p(attributes),
            ctypes.c_int(_ALL_PROCESSES),
            ctypes.c_int(cpu),
            ctypes.c_int(_NO_GROUP),
            ctypes.c_ulong(_CLOEXEC),
        )
        if self._descriptor < 0:
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error))

    def read(self) -> int:
        """Return the count, scaled up where the unit counted other events in turn with it."""
        count, enabled_ns, running_ns = _READING.unpack(os.read(self._descriptor, _READING.size))
        if running_ns in (0, enabled_ns):
            return int(count)
        return int(count * enabled_ns / running_ns)

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self._descriptor)
