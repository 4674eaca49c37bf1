"""Memory that loading leaves behind: freed by us, kept by the allocator."""

from __future__ import annotations

import ctypes
import gc
from contextlib import suppress


def trim_heap() -> None:
    """Give freed memory back to the system where the C library can (glibc's malloc_trim).

    Loading unpacks each weight on the way; without this some 100 MB of that stay with the process.
    """
    gc.collect()
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
