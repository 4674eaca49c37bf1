"""Sizes and counts as people write and read them."""

from __future__ import annotations

import argparse
import math
import re

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def parse_size(text: str) -> int:
    """Parse `16GiB`, `16G` (both 2^30), `16GB` (10^9) or plain bytes.

    Raises argparse.ArgumentTypeError with what is accepted.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write it like 16GiB or 900MB")
    number, prefix, binary = match.groups()
    is_decimal = prefix and not binary and text.strip().lower().endswith("b")
    size = int(float(number) * (1000 if is_decimal else 1024) ** _POWERS[prefix.lower()])
    if size <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} must be more than zero")
    return size


def positive_int(text: str) -> int:
    """Parse an integer of at least 1. Raises argparse.ArgumentTypeError."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return number


def port_number(text: str) -> int:
    """Parse a TCP port. Raises argparse.ArgumentTypeError."""
    number = positive_int(text)
    if number > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port; ports end at 65535")
    return number


def port_or_free(text: str) -> int:
    """Parse a TCP port, or 0 for a free one. Raises argparse.ArgumentTypeError."""
    return 0 if text == "0" else port_number(text)


def count(text: str) -> int:
    """Parse an integer of at least 0. Raises argparse.ArgumentTypeError."""
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 0")
    return int(text)


def positive_float(text: str) -> float:
    """Parse a finite number above 0. Raises argparse.ArgumentTypeError."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return number


def format_bytes(num_bytes: int) -> str:
    """Write bytes with a binary unit and three figures or so: `162 MiB`, `5.31 GiB`."""
    size = float(abs(num_bytes))
    sign = "-" if num_bytes < 0 else ""
    for unit in ("B", "KiB", "MiB"):
        if size < 1000:
            return f"{sign}{size:.0f} {unit}"
        size /= 1024
    return f"{sign}{size:.2f} GiB"


def format_count(number: int) -> str:
    """Write a count of weights: `135 M`, `7.62 B`."""
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.0f} M"
