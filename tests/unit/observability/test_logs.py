from __future__ import annotations

import contextlib
import errno
import io
import json
import logging
import os
from collections.abc import Iterator

import pytest

from serve_app.config.schema import LoggingSection
from serve_app.observability.log_metrics import LostLines
from serve_app.observability.logs import (
    ROOT_LOGGER,
    SteadyHandler,
    request_id_var,
    setup_logging,
)


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    logger = logging.getLogger(ROOT_LOGGER)
    before = (list(logger.handlers), logger.level, logger.propagate)
    yield
    logger.handlers[:], logger.level, logger.propagate = before
    logger.setLevel(before[1])


def written(encoding: str, level: str = "INFO") -> tuple[logging.Logger, io.StringIO]:
    stream = io.StringIO()
    setup_logging(LoggingSection(encoding=encoding, level=level), stream)
    return logging.getLogger("serve_app.somewhere"), stream


def test_text_line_carries_the_request_id_and_stays_one_line():
    logger, stream = written("TEXT")
    token = request_id_var.set("req-1")
    logger.info("first\nforged line")
    request_id_var.reset(token)
    logger.info("outside")
    first, second = stream.getvalue().splitlines()
    assert first.endswith("INFO    serve_app.somewhere [req-1] first\\nforged line")
    assert second.endswith("serve_app.somewhere outside")


def test_json_line_is_an_object_with_extras_and_traceback():
    logger, stream = written("JSON")
    request_id_var.set("req-2")
    try:
        raise ValueError("boom")
    except ValueError:
        logger.exception("failed %d", 3, extra={"stage": "load"})
    entry = json.loads(stream.getvalue())
    assert entry["message"] == "failed 3"
    assert entry["request_id"] == "req-2"
    assert entry["stage"] == "load"
    assert entry["level"] == "ERROR"
    assert "ValueError: boom" in entry["exception"]
    request_id_var.set("")


def test_level_and_second_call_replace_the_first():
    _, first = written("TEXT", "DEBUG")
    logger, second = written("TEXT", "WARNING")
    logger.info("quiet")
    logger.warning("loud")
    assert first.getvalue() == ""
    assert len(second.getvalue().splitlines()) == 1


def test_other_packages_are_left_alone():
    root_handlers = list(logging.getLogger().handlers)
    written("TEXT")
    assert logging.getLogger().handlers == root_handlers


class FullDisk(io.StringIO):
    """A stream whose writes fail while `is_full`."""

    is_full = False

    def flush(self) -> None:
        if self.is_full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_ends_nothing_and_is_told_once_it_has_room(capsys) -> None:
    stream, before = FullDisk(), SteadyHandler.num_lost_in_all
    setup_logging(LoggingSection(), stream)
    logger = logging.getLogger("serve_app.somewhere")
    logger.info("first")
    stream.is_full = True
    for place in range(3):
        logger.info("lost %d", place)
    assert SteadyHandler.num_lost_in_all - before == 3
    told = LostLines().collect()
    assert next(told).samples[0].value == SteadyHandler.num_lost_in_all
    stream.is_full = False
    logger.info("again")
    logger.info("last")
    lines = stream.getvalue().splitlines()
    (notice,) = [line for line in lines if "could not be written" in line]
    assert "3 log lines before" in notice
    assert "No space left on device" in notice
    assert [line.split()[-1] for line in lines[-3:]] == ["again", "device", "last"]
    assert capsys.readouterr().err == "", "no traceback for each line"


def test_the_kernels_own_full_device() -> None:
    before = SteadyHandler.num_lost_in_all
    stream = io.TextIOWrapper(io.FileIO("/dev/full", "w"), write_through=True)
    setup_logging(LoggingSection(), stream)
    for _ in range(5):
        logging.getLogger("serve_app.somewhere").error("x" * 5000)
    assert SteadyHandler.num_lost_in_all - before == 5
    with contextlib.suppress(OSError):
        stream.close()


def test_a_line_that_cannot_be_made_is_a_bug_and_no_full_disk(capsys) -> None:
    setup_logging(LoggingSection(), io.StringIO())
    before = SteadyHandler.num_lost_in_all
    logging.getLogger("serve_app.somewhere").info("%d", "no number")
    assert SteadyHandler.num_lost_in_all == before
    assert "Logging error" in capsys.readouterr().err
