"""The last minutes of one ingress replica: latencies per slot of time, recent errors, who served.

Kept for the status page, where no Prometheus need run. Plain values that several replicas' copies
merge from; nothing of what was asked or answered.
"""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

SLOT_S = 5
NUM_SLOTS = 60
MAX_ERRORS = 50
_LOG_STEP = math.log(1.1)
_SMALLEST_S = 1e-4


@dataclass(frozen=True, slots=True)
class ErrorEntry:
    """One error: `at_s` in Unix seconds, the status, the error's type and code, never its text."""

    at_s: float
    status: int
    type: str
    code: str
    endpoint: str
    request_id: str


@dataclass(slots=True)
class Slot:
    """What began in SLOT_S seconds. Latencies are counted in steps of 10 % (step → count)."""

    ttft: Counter[int] = field(default_factory=Counter)
    tpot: Counter[int] = field(default_factory=Counter)
    num_tokens: int = 0
    num_finished: int = 0


@dataclass(frozen=True, slots=True)
class ActivityReport:
    """A copy of an `Activity` that may cross processes: slots by their number, errors, counts."""

    slots: Mapping[int, Slot] = field(default_factory=dict)
    errors: tuple[ErrorEntry, ...] = ()
    served_by: Mapping[str, int] = field(default_factory=dict)
    num_in_flight: int = 0


class Activity:
    """Records; for one event loop. `clock` returns Unix seconds, so that replicas' slots agree."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._slots: dict[int, Slot] = {}
        self._errors: deque[ErrorEntry] = deque(maxlen=MAX_ERRORS)
        self._served_by: Counter[str] = Counter()
        self.num_in_flight = 0

    def note_first_token(self, seconds: float) -> None:
        """Note a time to first token."""
        self._slot().ttft[_step(seconds)] += 1

    def note_finish(self, tpot_s: float | None, num_tokens: int) -> None:
        """Note the end of a sequence: its mean time per token after the first, if it had any."""
        slot = self._slot()
        slot.num_finished += 1
        slot.num_tokens += num_tokens
        if tpot_s is not None:
            slot.tpot[_step(tpot_s)] += 1

    def note_error(
        self, status: int, type_: str, code: str, endpoint: str, request_id: str
    ) -> None:
        """Note an error; the oldest of more than MAX_ERRORS is forgotten."""
        self._errors.append(ErrorEntry(self._clock(), status, type_, code, endpoint, request_id))

    def note_served(self, by: str) -> None:
        """Note who answered an inference request: `local` or `fallback`."""
        self._served_by[by] += 1

    def report(self) -> ActivityReport:
        """Return what lies within the last NUM_SLOTS slots."""
        self._forget()
        return ActivityReport(
            dict(self._slots), tuple(self._errors), dict(self._served_by), self.num_in_flight
        )

    def _slot(self) -> Slot:
        number = int(self._clock() // SLOT_S)
        slot = self._slots.get(number)
        if slot is None:
            self._forget()
            slot = self._slots[number] = Slot()
        return slot

    def _forget(self) -> None:
        oldest = int(self._clock() // SLOT_S) - NUM_SLOTS
        for number in [number for number in self._slots if number <= oldest]:
            del self._slots[number]


def merge_reports(reports: Iterable[ActivityReport]) -> ActivityReport:
    """Return the sum of several replicas' reports; the newest MAX_ERRORS errors stay."""
    slots: dict[int, Slot] = {}
    errors: list[ErrorEntry] = []
    served_by: Counter[str] = Counter()
    num_in_flight = 0
    for report in reports:
        for number, slot in report.slots.items():
            sum_ = slots.setdefault(number, Slot())
            sum_.ttft.update(slot.ttft)
            sum_.tpot.update(slot.tpot)
            sum_.num_tokens += slot.num_tokens
            sum_.num_finished += slot.num_finished
        errors.extend(report.errors)
        served_by.update(report.served_by)
        num_in_flight += report.num_in_flight
    errors.sort(key=lambda error: error.at_s)
    return ActivityReport(slots, tuple(errors[-MAX_ERRORS:]), dict(served_by), num_in_flight)


def quantile(counts: Mapping[int, int], share: float) -> float | None:
    """Return the latency (seconds, within 5 %) that `share` of the counted ones do not exceed."""
    total = sum(counts.values())
    if not total:
        return None
    rank = max(1, math.ceil(share * total))
    for step in sorted(counts):
        rank -= counts[step]
        if rank <= 0:
            return math.exp(step * _LOG_STEP)
    raise AssertionError("the ranks end within the counts")


def last_slots(report: ActivityReport, now_s: float) -> Sequence[Slot]:
    """Return NUM_SLOTS slots up to the one before `now_s` (whole ones), empty where nothing was."""
    newest = int(now_s // SLOT_S) - 1
    return [
        report.slots.get(number, Slot()) for number in range(newest - NUM_SLOTS + 1, newest + 1)
    ]


def _step(seconds: float) -> int:
    return round(math.log(max(seconds, _SMALLEST_S)) / _LOG_STEP)
