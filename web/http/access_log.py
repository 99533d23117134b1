"""gunicorn's log in the format of the rest of the process: one JSON line per request, with its id."""

from __future__ import annotations

import logging
from datetime import timedelta
from typing import Any

from gunicorn.glogging import Logger  # type: ignore[import-untyped]

from shared.load_settings import load_settings
from shared.logging import configure
from web.http.environ import JOB_ID, KEY_ID, QUEUE_POSITION
from web.http.request_id import ENVIRON_KEY

log = logging.getLogger("web.access")


class JsonLogger(Logger):  # type: ignore[misc]
    """gunicorn's `logger_class`."""

    def setup(self, cfg: Any) -> None:
        """Send gunicorn's messages to the root logger instead of to handlers of its own."""
        self.cfg = cfg
        configure("web", load_settings().log_level)
        self.error_log.propagate = True

    def access(self, resp: Any, req: Any, environ: dict[str, Any], request_time: timedelta) -> None:  # noqa: ARG002
        """Log a request after its response was sent; a stream is logged when it ends."""
        status = int(str(resp.status).split()[0])
        log.info(
            "%s %s %d",
            environ["REQUEST_METHOD"],
            environ.get("PATH_INFO", ""),
            status,
            extra={
                "request_id": environ.get(ENVIRON_KEY, ""),
                "job_id": environ.get(JOB_ID, ""),
                "key": environ.get(KEY_ID, ""),
                "queue_position": environ.get(QUEUE_POSITION),
                "status": status,
                "duration_ms": round(request_time.total_seconds() * 1000, 1),
                "bytes": resp.sent,
                "client": environ.get("REMOTE_ADDR", ""),
            },
        )
