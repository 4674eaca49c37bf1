"""`xeray doctor`: what is wrong with this machine, and what known faults and guides mean."""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from shutil import get_terminal_size
from typing import TypeVar

from rich.console import Console

from serve_app.core.errors import ConfigError
from serve_app.doctor.host import Host
from serve_app.doctor.knowledge import Fault, GuideClaim, faults, guide_claims, search_faults
from serve_app.doctor.report import (
    QUICK_CHECKS,
    SPEED_CHECKS,
    exit_code,
    run_checks,
    write_bundle,
)
from serve_app.doctor.result import CheckResult, Status

_MAX_WIDTH = 100
_Row = TypeVar("_Row", Fault, GuideClaim)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `xeray doctor`."""
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.add_argument("--quick", action="store_true", help="only read; measure nothing")
    parser.add_argument(
        "--bundle",
        type=Path,
        metavar="FILE",
        help="also write a support archive (.tar.gz), with secrets taken out",
    )
    parser.set_defaults(run=run_doctor)
    commands = parser.add_subparsers(dest="doctor_command", metavar="COMMAND")
    explain = commands.add_parser(
        "explain",
        help="look a symptom or an error message up",
        description="Look an error message up; `guides` lists claims of copied guides.",
    )
    explain.add_argument(
        "question", nargs="*", help="an error message, some words, a fault's id, or `guides`"
    )
    explain.add_argument(
        "--json", action="store_true", default=argparse.SUPPRESS, help="print the rows as JSON"
    )
    explain.set_defaults(run=run_explain)


def run_doctor(options: argparse.Namespace) -> int:
    """Run all checks; exit code 1 where one FAILs."""
    host = Host()
    checks = QUICK_CHECKS if options.quick else QUICK_CHECKS + SPEED_CHECKS
    results = []
    console = Console(stderr=True)
    with console.status("checking") as status:
        for result in run_checks(host, checks, lambda name: status.update(f"checking {name}")):
            results.append(result)
            if not options.json:
                console.file.flush()
                print(_format_result(result), flush=True)
    if options.json:
        print(json.dumps([asdict(result) for result in results], indent=2, ensure_ascii=False))
    else:
        print(_summary(results))
    if options.bundle is not None:
        try:
            names = write_bundle(options.bundle, host, results)
        except OSError as error:
            raise ConfigError(f"--bundle: {options.bundle}: {error.strerror}") from error
        print(f"{options.bundle}: {len(names)} files, redacted", file=sys.stderr)
    return exit_code(results)


def _format_result(result: CheckResult) -> str:
    lines = [f"{result.status:4}  {result.name}: {result.evidence}"]
    if result.fix:
        lines.append(f"      fix: {result.fix}")
    if result.fault:
        lines.append(f"      more: xeray doctor explain {result.fault}")
    return "\n".join(lines)


def _summary(results: Sequence[CheckResult]) -> str:
    counts = {status: sum(r.status is status for r in results) for status in Status}
    return ", ".join(f"{count} {status}" for status, count in counts.items())


def run_explain(options: argparse.Namespace) -> int:
    """Print what fits the question; without one, the list of all faults."""
    question = " ".join(options.question)
    if question == "guides":
        _print_rows(guide_claims(), _format_claim, options.json)
        return 0
    if not question:
        _print_rows(faults(), _format_title, options.json)
        return 0
    found = search_faults(question)
    if not found:
        raise ConfigError(
            f"nothing is known about {question!r}; `xeray doctor explain` lists all faults"
        )
    _print_rows(found, _format_fault, options.json)
    return 0


def _print_rows(rows: Sequence[_Row], render: Callable[[_Row], str], as_json: bool) -> None:
    if as_json:
        print(json.dumps([asdict(row) for row in rows], indent=2, ensure_ascii=False))
        return
    sys.stdout.write("\n".join(render(row) for row in rows) + "\n")


def _format_title(fault: Fault) -> str:
    return f"{fault.id:24} {fault.title}"


def _format_fault(fault: Fault) -> str:
    parts = (("symptom", fault.symptom), ("cause", fault.cause), ("fix", fault.fix))
    return "\n".join([f"{fault.title}  [{fault.id}]", *_fields(parts, fault.sources)])


def _format_claim(claim: GuideClaim) -> str:
    head = f"{claim.verdict.upper()}: {claim.claim}"
    parts = (("in truth", claim.truth), ("instead", claim.instead))
    return "\n".join([head, *_fields(parts, claim.sources)])


def _fields(parts: Iterable[tuple[str, str]], sources: Iterable[str]) -> list[str]:
    width = min(get_terminal_size().columns, _MAX_WIDTH)
    lines = []
    for name, text in parts:
        head = f"  {name:9}"
        lines.append(textwrap.fill(text, width, initial_indent=head, subsequent_indent=" " * 11))
    lines += [f"  {'source':9}{source}" for source in sources]
    return [*lines, ""]
