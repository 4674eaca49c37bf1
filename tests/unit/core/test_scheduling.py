from __future__ import annotations

import os
import subprocess
import sys

from serve_app.core.scheduling import children_wait

PROGRAM = """
import os
from serve_app.core.scheduling import compute_first
before = os.sched_getscheduler(0)
compute_first()
print(before == os.SCHED_BATCH, os.sched_getscheduler(0) == os.SCHED_OTHER)
"""


def test_children_wait_until_they_compute_and_their_parent_is_as_before():
    before = os.sched_getscheduler(0)
    with children_wait():
        child = subprocess.run(
            [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True
        )
    assert child.stdout.split() == ["True", "True"]
    assert os.sched_getscheduler(0) == before


def test_a_machine_that_forbids_it_changes_nothing(monkeypatch):
    def refuse(*args: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    before = os.sched_getscheduler(0)
    with children_wait():
        assert os.sched_getscheduler(0) == before
