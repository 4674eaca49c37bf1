"""How far a load is: a bar on a terminal, a line at each quarter elsewhere; both on stderr."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from serve_app.bench.load import RequestRecord

_NUM_LINES = 4


class LoadProgress:
    """Counts the requests of one load as they complete; a context manager."""

    def __init__(self, label: str, num_requests: int, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._label = label
        self._num_requests = num_requests
        self._num_done = 0
        self._num_failed = 0
        self._num_tokens = 0
        self._task: TaskID | None = None
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )

    def __enter__(self) -> Self:
        self._bar.start()
        self._task = self._bar.add_task(self._label, total=self._num_requests, note="")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def take(self, record: RequestRecord) -> None:
        """Count one request."""
        self._num_done += 1
        self._num_failed += record.error is not None
        self._num_tokens += record.num_output_tokens
        note = f"{self._num_tokens} tokens"
        note += f", {self._num_failed} failed" if self._num_failed else ""
        if self._task is not None:
            self._bar.update(self._task, completed=self._num_done, note=note)
        if not self._console.is_terminal and self._is_quarter():
            self._console.print(
                f"  {self._label}: {self._num_done} of {self._num_requests} requests, {note}",
                soft_wrap=True,
                highlight=False,
                markup=False,
            )

    def _is_quarter(self) -> bool:
        before = (self._num_done - 1) * _NUM_LINES // self._num_requests
        return self._num_done * _NUM_LINES // self._num_requests > before
