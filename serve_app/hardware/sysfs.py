"""One value per file, as the kernel writes them: a number and a line feed, or nothing at all."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


def read_text(path: Path) -> str | None:
    """Return the stripped content, or None where the file is absent or may not be read."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:  # absent on this kernel, root only, or the device has just gone
        return None


def read_int(path: Path) -> int | None:
    """Return the integer in a file, or None where there is none."""
    text = read_text(path)
    try:
        return None if text is None else int(text)
    except ValueError:
        return None


def first_int(paths: Iterable[Path]) -> int | None:
    """Return the first integer that any of the files holds; kernels name the same thing twice."""
    for path in paths:
        value = read_int(path)
        if value is not None:
            return value
    return None
