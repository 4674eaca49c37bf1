"""Limits that are put back however the process ends.

Ownership::

    our process ── pipe ──> guardian (own session: a signal to our group does not reach it)
         │                      │ the pipe ends, whatever ended us
         └── journal: the values before ──┘ written back, then removed

The journal is on disk before the first value changes. Should both processes die at once (a power
cut resets the cards anyway), the next `CapGuard`, or `restore_left_over`, finds it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from serve_app.core.errors import ConfigError
from serve_app.hardware.card_lock import CardLock, lock_dir
from serve_app.hardware.power.caps import CapFile, write_all
from serve_app.hardware.sysfs import read_text

_JOURNAL = "power-caps.json"
_READY = b"ready\n"
_GUARDIAN_TIMEOUT_S = 10.0


def journal_path() -> Path:
    """Return where the values of this host's cards are kept while they are changed."""
    return lock_dir() / _JOURNAL


def restore_left_over(journal: Path | None = None) -> list[Path]:
    """Write back what a dead run left changed; returns the files. Nothing to do is []."""
    journal = journal or journal_path()
    text = read_text(journal)
    if text is None:
        return []
    try:
        values = [(Path(path), str(value)) for path, value in json.loads(text)]
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{journal} is damaged: delete it and restart the machine") from error
    write_all(values)
    journal.unlink(missing_ok=True)
    return [path for path, _ in values]


class CapGuard:
    """``with CapGuard(caps) as guard: guard.set(...)``: all values are as before afterwards.

    One at a time on a host. Raises ConfigError where another holds the limits.
    """

    def __init__(self, caps: Sequence[CapFile], journal: Path | None = None) -> None:
        self._caps = tuple(caps)
        self._journal = journal or journal_path()
        self._lock = CardLock("power-caps", self._journal.parent)
        self._guardian: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        if not self._lock.try_acquire():
            raise ConfigError("another process changes power limits; wait until it has ended")
        try:
            restore_left_over(self._journal)
            self._write_journal()
            self._start_guardian()
        except BaseException:
            self._journal.unlink(missing_ok=True)  # nothing has been changed yet
            self._lock.release()
            raise
        return self

    def set(self, values: Sequence[tuple[CapFile, float]]) -> None:
        """Apply limits in the caps' own units. Raises ConfigError outside of their bounds."""
        write_all([(cap.path, cap.raw(value)) for cap, value in values])

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            restore_left_over(self._journal)
        finally:
            self._end_guardian()
            self._lock.release()

    def _write_journal(self) -> None:
        values = [(str(cap.path), cap.path.read_text().strip()) for cap in self._caps]
        draft = self._journal.with_suffix(".tmp")
        with draft.open("w") as file:
            json.dump(values, file)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(self._journal)

    def _start_guardian(self) -> None:
        self._guardian = subprocess.Popen(
            [sys.executable, "-m", "serve_app.hardware.power.guardian", str(self._journal)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert self._guardian.stdout is not None, "piped above"
        if self._guardian.stdout.readline() != _READY:
            raise ConfigError("the process that puts limits back could not be started")

    def _end_guardian(self) -> None:
        if self._guardian is not None:
            for pipe in (self._guardian.stdin, self._guardian.stdout):
                if pipe is not None:
                    pipe.close()
            self._guardian.wait(_GUARDIAN_TIMEOUT_S)
