"""Reports the death of a worker process to the queue, and in one line of the log.

While Redis is unreachable, the report is retried a few times. Then the breadcrumb stays on disk, and the next process
with the same label reports it. Without any report, the jobs return to the queue when the leases lapse.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Final

import redis

from shared.load_settings import load_settings
from shared.logging import configure
from shared.queue.recovery import CrashOutcome, report_crash
from shared.redis.client import connect
from shared.settings import Settings
from worker.process import breadcrumb
from worker.process.breadcrumb import Trace
from worker.process.exits import Exit
from worker.process.identity import process_name

logger = logging.getLogger("worker.process")

TRIES: Final = 3
TRY_S: Final = 1.0
"""Time limit for connecting, and for the call."""
PAUSE_S: Final = 0.3
"""Pause before the second try; the pause before the third is twice as long."""


def report_exit(ended: Exit, token: str) -> None:
    """Report the death of the process that this launcher started.

    Args:
        token: of the process's start (`worker.process.parent.Launch`).
    """
    settings = load_settings()
    path = breadcrumb.find(settings.run_dir, token)
    configure(process_name(settings, breadcrumb.label_of(path)) if path else "worker", settings.log_level)
    report(settings, path, ended)


def report_leftovers(settings: Settings, label: str) -> None:
    """Report the deaths of earlier processes with this label whose launchers died as well."""
    for path in breadcrumb.leftovers(settings.run_dir, label):
        report(settings, path, None)


def report(settings: Settings, path: Path | None, ended: Exit | None) -> None:
    """Report one death, and remove the breadcrumb once the queue has the report.

    Args:
        path: the process's breadcrumb; None if it wrote none.
        ended: how the process ended; None if that is unknown.
    """
    trace = breadcrumb.read(path) if path else None
    how = ended.describe() if ended else "unknown"
    outcome = _report_to_queue(settings, trace or Trace(), how if ended else "")
    if path and outcome is not None:
        path.unlink(missing_ok=True)
    if ended or (outcome and outcome.models):  # a leftover whose jobs have continued long ago is not worth a line
        _log(trace, ended, how, outcome)


def _report_to_queue(settings: Settings, trace: Trace, how: str) -> CrashOutcome | None:
    """Report to the queue; None if Redis stayed unreachable."""
    in_flight = trace.jobs if trace.phase == "step" else ()
    if not trace.workers:
        return CrashOutcome((), (), ())
    client = connect(settings.store_url, timeout_s=TRY_S, retries=0)
    try:
        for attempt in range(TRIES):
            time.sleep(PAUSE_S * attempt)
            try:
                return report_crash(client, trace.workers, in_flight, settings.max_attempts, how)
            except redis.RedisError as error:
                logger.debug("death_not_reported", extra={"reason": str(error)})
        return None
    finally:
        client.close()


def _log(trace: Trace | None, ended: Exit | None, how: str, outcome: CrashOutcome | None) -> None:
    fields: dict[str, object] = {"exit": how, "reported": outcome is not None}
    if ended is not None:
        fields |= {"pid": ended.pid, "uptime_s": round(ended.uptime_s or 0.0, 1), "oom_kills": ended.oom_kills}
    if trace is None:
        fields["breadcrumb"] = "missing"
    else:
        fields |= {"phase": trace.phase, "in_flight": len(trace.jobs), "breadcrumb": "torn" if trace.torn else "whole"}
        fields |= {"pid": trace.pid, "model": trace.model}
    if outcome is not None:
        fields |= {"suspects": list(outcome.suspects), "failed": list(outcome.failed)}
    logger.error("worker_process_died", extra=fields)
