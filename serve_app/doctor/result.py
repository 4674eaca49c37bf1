"""What a check says: a status, the evidence for it, and what to type."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum

from serve_app.doctor.host import Host


class Status(StrEnum):
    """PASS: as it should be. WARN: works, but slower or less safe. FAIL: must be mended."""

    PASS = "PASS"
    WARN = "WARN"
    FAIL = "FAIL"
    SKIP = "SKIP"


@dataclass(frozen=True, slots=True)
class CheckResult:
    """One line of the report. `fault` is an id of the knowledge base; `fix` a command or a step."""

    name: str
    status: Status
    evidence: str
    fix: str = ""
    fault: str = ""


Check = Callable[[Host], Iterator[CheckResult]]
"""Yields one result, or one for each device."""


def passed(name: str, evidence: str) -> CheckResult:
    """Return a PASS."""
    return CheckResult(name, Status.PASS, evidence)


def warned(name: str, evidence: str, fix: str, fault: str = "") -> CheckResult:
    """Return a WARN."""
    return CheckResult(name, Status.WARN, evidence, fix, fault)


def failed(name: str, evidence: str, fix: str, fault: str = "") -> CheckResult:
    """Return a FAIL."""
    return CheckResult(name, Status.FAIL, evidence, fix, fault)


def skipped(name: str, why: str) -> CheckResult:
    """Return a SKIP: there is nothing to check here, or it may not be read."""
    return CheckResult(name, Status.SKIP, why)
