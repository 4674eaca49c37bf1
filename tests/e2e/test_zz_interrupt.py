"""Ends the service: last in the folder by its name, since no other test can use it afterwards."""

from __future__ import annotations

from typing import Any


def test_ctrl_c_ends_everything_that_was_started(service: Any) -> None:
    assert len(service.processes()) > 3

    service.interrupt()

    assert service.exit_code in (0, 130), service.output
    assert service.leftovers == []
    assert service.processes() == []
    assert "Traceback" not in service.output
