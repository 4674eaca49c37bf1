"""Logs of our own processes: TEXT or JSON lines on stderr, each with the id of its request."""

from __future__ import annotations

import json
import logging
import sys
import time
from contextvars import ContextVar
from typing import TextIO

from serve_app.config.schema import LoggingSection

ROOT_LOGGER = "serve_app"
"""Every logger of ours is a child of this one."""

request_id_var: ContextVar[str] = ContextVar("xeray_request_id", default="")
"""Id of the request that the current task works for; empty outside of one."""

trace_id_var: ContextVar[str] = ContextVar("xeray_trace_id", default="")
"""Id of the trace that the current task belongs to; empty outside of one."""

_STANDARD_FIELDS = frozenset(logging.makeLogRecord({}).__dict__) | {
    "message",
    "request_id",
    "trace_id",
    "asctime",
}


class RequestIdFilter(logging.Filter):
    """Puts the current request's and trace's id on each record that does not bring its own."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Add `request_id` and `trace_id`; keeps every record."""
        if not hasattr(record, "request_id"):
            record.request_id = request_id_var.get()
        if not hasattr(record, "trace_id"):
            record.trace_id = trace_id_var.get()
        return True


class TextFormatter(logging.Formatter):
    """`time level logger [request id] message` on one line; a traceback follows on its own."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as text."""
        clock = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created))
        request_id = getattr(record, "request_id", "")
        where = f" [{request_id}]" if request_id else ""
        line = (
            f"{clock}.{int(record.msecs):03d} {record.levelname:<7} "
            f"{record.name}{where} {_one_line(record.getMessage())}"
        )
        if record.exc_info:
            line = f"{line}\n{self.formatException(record.exc_info)}"
        return line


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (UTC), level, logger, message, request_id, trace_id, extras."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as one line of JSON."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        entry: dict[str, object] = {
            "time": f"{stamp}.{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if request_id := getattr(record, "request_id", ""):
            entry["request_id"] = request_id
        if trace_id := getattr(record, "trace_id", ""):
            entry["trace_id"] = trace_id
        for key, value in record.__dict__.items():
            if key not in _STANDARD_FIELDS:
                entry[key] = value
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


class SteadyHandler(logging.StreamHandler[TextIO]):
    """Writes lines; those that cannot be written are counted, and told when one can again.

    A full disk must not end a request, and what it swallowed must not go unnoticed.
    """

    num_lost_in_all = 0
    """Lines of this process that could not be written."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._num_untold = 0
        self._reason = ""

    def emit(self, record: logging.LogRecord) -> None:
        """Write the record; where lines were lost before it, say so behind it."""
        was_untold = self._num_untold
        super().emit(record)
        if not was_untold or self._num_untold > was_untold:
            return
        self._num_untold = 0
        message = f"{was_untold} log lines before could not be written: {self._reason}"
        told = logging.LogRecord(
            __name__, logging.ERROR, __file__, 0, message, args=None, exc_info=None
        )
        self.handle(told)

    def handleError(self, record: logging.LogRecord) -> None:
        """Count a line that could not be written; anything else is a bug, told as usual."""
        error = sys.exception()
        if not isinstance(error, OSError):
            super().handleError(record)
            return
        self._num_untold += 1
        SteadyHandler.num_lost_in_all += 1
        self._reason = error.strerror or type(error).__name__


def setup_logging(section: LoggingSection, stream: TextIO | None = None) -> logging.Logger:
    """Send our loggers to `stream` (default stderr) as `section` says; a second call replaces that.

    Loggers of other packages are left alone, so that Ray's own set-up keeps working.
    """
    handler = SteadyHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if section.encoding == "JSON" else TextFormatter())
    handler.addFilter(RequestIdFilter())
    logger = logging.getLogger(ROOT_LOGGER)
    for old in list(logger.handlers):
        logger.removeHandler(old)
    logger.addHandler(handler)
    logger.setLevel(section.level)
    logger.propagate = False
    return logger


def _one_line(message: str) -> str:
    # A newline inside a message could fake a log line.
    return (
        message.replace("\r", "\\r").replace("\n", "\\n")
        if "\n" in message or "\r" in message
        else message
    )
