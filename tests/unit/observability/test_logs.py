from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest

from serve_app.config.schema import LoggingSection
from serve_app.observability.logs import ROOT_LOGGER, request_id_var, setup_logging


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
