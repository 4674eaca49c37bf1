"""The machine as the checks see it: everything that a test replaces is here."""

from __future__ import annotations

import importlib
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from serve_app.hardware.cards import Card, list_cards

_TIMEOUT_S = 20.0


@dataclass(frozen=True, slots=True)
class CommandOutput:
    """What a program printed, stdout and stderr together, and its exit status."""

    returncode: int
    text: str


@dataclass(frozen=True)
class Host:
    """`root` is the folder under which `sys`, `proc` and `dev` lie; `env` the environment."""

    root: Path = Path("/")
    env: Mapping[str, str] = field(default_factory=lambda: os.environ)

    def run(self, *command: str, timeout_s: float = _TIMEOUT_S) -> CommandOutput | None:
        """Run a program; None where it is not installed or does not end in time."""
        return _run(command, timeout_s)

    def module(self, name: str) -> Any:
        """Return an imported module, or None where it cannot be imported."""
        try:
            return importlib.import_module(name)
        except Exception:  # a broken build may raise anything: OSError from a library, too
            return None

    def cards(self) -> tuple[Card, ...]:
        """Return the real Intel GPUs that a driver is bound to, discrete ones first."""
        found = list_cards(self.root, {})
        return (*found.discrete, *found.integrated)

    def can_open(self, path: Path) -> bool:
        """Return whether this user may read and write `path`."""
        return os.access(path, os.R_OK | os.W_OK)


def _run(command: Sequence[str], timeout_s: float) -> CommandOutput | None:
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=timeout_s,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return CommandOutput(done.returncode, done.stdout.decode(errors="replace"))
