from __future__ import annotations

import argparse
from collections.abc import Callable

import pytest

from serve_app.cli.units import (
    count,
    format_bytes,
    format_count,
    parse_size,
    port_or_free,
    positive_float,
    positive_int,
)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("16GiB", 16 << 30),
        ("16G", 16 << 30),
        ("16gb", 16 * 10**9),
        ("1.5 GiB", 3 << 29),
        ("900MB", 900 * 10**6),
        ("4096", 4096),
        ("4096B", 4096),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "12x", "-3GiB", "0", "1e9", "16 GiB GiB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        parse_size(text)


@pytest.mark.parametrize(
    ("parse", "good", "bad"),
    [
        (count, {"0": 0, "12": 12}, ("-1", "1.0", "", "²")),
        (positive_float, {"0.5": 0.5, "3": 3.0}, ("0", "-1", "inf", "nan", "x")),
        (port_or_free, {"0": 0, "65535": 65535}, ("65536", "-1", "http")),
    ],
)
def test_numbers(parse: Callable[[str], float], good: dict[str, float], bad: tuple[str, ...]):
    assert {text: parse(text) for text in good} == good
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError):
            parse(text)


def test_positive_int() -> None:
    assert positive_int("3") == 3
    for text in ("0", "-1", "3.5", "x"):
        with pytest.raises(argparse.ArgumentTypeError):
            positive_int(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (162 << 20, "162 MiB"),
        (5 << 30, "5.00 GiB"),
        (-(1 << 30), "-1.00 GiB"),
    ],
)
def test_bytes_as_text(size: int, text: str) -> None:
    assert format_bytes(size) == text


def test_counts_as_text() -> None:
    assert format_count(134_515_008) == "135 M"
    assert format_count(7_615_000_000) == "7.62 B"
