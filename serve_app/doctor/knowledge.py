"""The knowledge base: faults (symptom, cause, fix) and claims of copied guides, with sources."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from math import log
from typing import Any, Literal

import yaml

Verdict = Literal["true", "outdated", "wrong", "misleading"]

_WORD = re.compile(r"[a-z0-9_+./-]*[a-z0-9+]")
_MATCH_BONUS = 100.0
"""A whole phrase of `matches` in the question outweighs any number of common words."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault. `matches` are phrases of real messages; `fix` says what to type."""

    id: str
    title: str
    matches: tuple[str, ...]
    symptom: str
    cause: str
    fix: str
    sources: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class GuideClaim:
    """One sentence of a widely copied guide, and what to do instead."""

    id: str
    claim: str
    verdict: Verdict
    truth: str
    instead: str
    sources: tuple[str, ...]


@cache
def faults() -> tuple[Fault, ...]:
    """Return all faults, most often met first."""
    return tuple(Fault(**_tuples(row, "matches", "sources")) for row in _rows("faults.yaml"))


@cache
def guide_claims() -> tuple[GuideClaim, ...]:
    """Return all claims of guides."""
    return tuple(GuideClaim(**_tuples(row, "sources")) for row in _rows("guides.yaml"))


def search_faults(question: str, limit: int = 3) -> list[Fault]:
    """Return the faults that fit a message or some words, best first; [] where none does.

    A fault's id finds it alone. Otherwise whole phrases of its `matches` count most, then words
    weighted by how rare they are among the faults (inverse document frequency).
    """
    wanted = question.strip().lower()
    for fault in faults():
        if fault.id == wanted:
            return [fault]
    words = set(_words(question))
    rarity = _rarity()
    scored = []
    for fault in faults():
        score = sum((rarity[word] for word in words & _words_of(fault)), 0.0)
        score += _MATCH_BONUS * sum(phrase.lower() in wanted for phrase in fault.matches)
        if score > 0:
            scored.append((score, fault))
    scored.sort(key=lambda pair: -pair[0])
    return [fault for score, fault in scored[:limit] if score >= scored[0][0] / 4]


def _rows(name: str) -> list[dict[str, Any]]:
    text = files("serve_app.doctor").joinpath(name).read_text(encoding="utf-8")
    rows: list[dict[str, Any]] = yaml.safe_load(text)
    return rows


def _tuples(row: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {**row, **{key: tuple(row[key]) for key in keys}}


def _words(text: str) -> list[str]:
    return [word for word in _WORD.findall(text.lower()) if len(word) > 2]


@cache
def _words_of(fault: Fault) -> frozenset[str]:
    parts = (fault.id.replace("-", " "), fault.title, *fault.matches, fault.symptom, fault.cause)
    return frozenset(_words(" ".join(parts)))


@cache
def _rarity() -> dict[str, float]:
    counts = Counter(word for fault in faults() for word in _words_of(fault))
    return {word: log(len(faults()) / count) for word, count in counts.items()}
