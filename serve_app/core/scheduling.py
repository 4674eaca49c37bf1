"""Which of the service's processes Linux lets interrupt which: none the engine's threads.

Where the engine computes on the cores that everything else needs too, a process that wakes up takes
a core in the middle of an operator, and the engine's other threads wait. Processes of the batch
policy wait instead, until the engine's threads yield: they do so between two operators, some
thousand times a second (see `models/kernels/cpu_team.h`).
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def children_wait() -> Iterator[None]:
    """Processes that the calling thread starts meanwhile, and theirs, have the batch policy."""
    before = os.sched_getscheduler(0)
    is_set = before == os.SCHED_OTHER and _set_policy(os.SCHED_BATCH)
    try:
        yield
    finally:
        if is_set:
            _set_policy(before)


def compute_first() -> None:
    """Give the calling thread, and those that it starts, the usual policy again."""
    if os.sched_getscheduler(0) == os.SCHED_BATCH:
        _set_policy(os.SCHED_OTHER)


def _set_policy(policy: int) -> bool:
    try:
        os.sched_setscheduler(0, policy, os.sched_param(0))
    except OSError:  # a container may forbid it
        logger.debug("the scheduling policy cannot be set", exc_info=True)
        return False
    return True
