"""Logs as JSON lines: one object per line, with the ids of the request and the job that it is about."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final

from pythonjsonlogger.json import JsonFormatter

_TELLS_TOO_MUCH: Final = "PIL"
"""At DEBUG, Pillow logs metadata of images: comments, places, names of cameras and people. It also warns about every
invalid tag, of which an image may have thousands, on lines that are not JSON."""

_request_id: ContextVar[str] = ContextVar("request_id", default="")
_job_id: ContextVar[str] = ContextVar("job_id", default="")


@contextmanager
def log_context(*, request_id: str = "", job_id: str = "") -> Iterator[None]:
    """Add these ids to all lines logged inside, also in greenlets and threads that copy the context."""
    tokens = (_request_id.set(request_id), _job_id.set(job_id or _job_id.get()))
    try:
        yield
    finally:
        _job_id.reset(tokens[1])
        _request_id.reset(tokens[0])


class _Correlate(logging.Filter):
    """Adds the ids to a record, unless the caller gave them with `extra`."""

    def filter(self, record: logging.LogRecord) -> bool:
        for name, variable in (("request_id", _request_id), ("job_id", _job_id)):
            if not getattr(record, name, "") and variable.get():
                setattr(record, name, variable.get())
        return True


class _Formatter(JsonFormatter):
    """Omits empty fields, so that lines stay readable."""

    def process_log_record(self, log_data: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in log_data.items() if value not in (None, "")}


def configure(process: str, level: str) -> None:
    """Send every logger of this process to stdout as JSON lines.

    Args:
        process: `web`, or a worker's name; in every line.
        level: least severe level logged.
    """
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(
        _Formatter(
            "{asctime}{levelname}{name}{message}",
            style="{",
            datefmt="%Y-%m-%dT%H:%M:%S%z",
            rename_fields={"asctime": "time", "levelname": "level", "name": "logger"},
            static_fields={"process": process},
        )
    )
    handler.addFilter(_Correlate())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    logging.getLogger(_TELLS_TOO_MUCH).setLevel(logging.INFO)
    warnings.filterwarnings("ignore", module=rf"{_TELLS_TOO_MUCH}\.")
