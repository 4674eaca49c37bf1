"""Python's garbage collector in a process that streams."""

from __future__ import annotations

import gc


def freeze_started_objects() -> None:
    """Leave what the start made out of later collections; to be called once it is done.

    A full collection walks every object of torch, Ray and transformers, which takes a tenth of a
    second, and all streams of the process wait for it.
    """
    gc.collect()
    gc.freeze()
