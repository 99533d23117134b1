"""The report of a dead worker process: to the queue, and one line to the log.

Redis may be away. The report is tried a few times; then the breadcrumb stays for the next start with the same label,
and the leases lapse by themselves.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Final

import redis

from shared.logging import configure
from shared.queue.deaths import Burial, bury
from shared.queue.redis import connect
from shared.settings import Settings, load_settings
from worker.process import breadcrumb
from worker.process.breadcrumb import Trace
from worker.process.exits import Exit
from worker.process.identity import process_name

logger = logging.getLogger("worker.process")

TRIES: Final = 3
TRY_S: Final = 1.0
"""Bound on connecting and on the call, each."""
PAUSE_S: Final = 0.3


def report_exit(ended: Exit, token: str) -> None:
    """Report the death of the process that a launcher started."""
    settings = load_settings()
    path = breadcrumb.find(settings.run_dir, token)
    configure(process_name(settings, breadcrumb.label_of(path)) if path else "worker", settings.log_level)
    report(settings, path, ended)


def report_leftovers(settings: Settings, label: str) -> None:
    """Report what earlier processes with this label have left behind when their launcher died as well."""
    for path in breadcrumb.leftovers(settings.run_dir, label):
        report(settings, path, None)


def report(settings: Settings, path: Path | None, ended: Exit | None) -> None:
    """Report one death, and remove its breadcrumb once the queue knows.

    Args:
        path: its breadcrumb; None: it wrote none.
        ended: how the process ended; None: unknown.
    """
    trace = breadcrumb.read(path) if path else None
    how = ended.describe() if ended else "unknown"
    burial = _bury(settings, trace or Trace(), how if ended else "")
    if path and burial is not None:
        path.unlink(missing_ok=True)
    if ended or (burial and burial.models):  # not for a leftover whose jobs have long been continued
        _log(trace, ended, how, burial)


def _bury(settings: Settings, trace: Trace, how: str) -> Burial | None:
    """Report to the queue; None when Redis stays away."""
    in_flight = trace.jobs if trace.phase == "step" else ()
    if not trace.workers:
        return Burial((), (), ())
    client = connect(settings.store_url, timeout_s=TRY_S, retries=0)
    try:
        for attempt in range(TRIES):
            time.sleep(PAUSE_S * attempt)
            try:
                return bury(client, trace.workers, in_flight, settings.max_attempts, how)
            except redis.RedisError as error:
                logger.debug("death_not_reported", extra={"reason": str(error)})
        return None
    finally:
        client.close()


def _log(trace: Trace | None, ended: Exit | None, how: str, burial: Burial | None) -> None:
    facts: dict[str, object] = {"exit": how, "reported": burial is not None}
    if ended is not None:
        facts |= {"pid": ended.pid, "uptime_s": round(ended.uptime_s or 0.0, 1), "oom_kills": ended.oom_kills}
    if trace is None:
        facts["breadcrumb"] = "missing"
    else:
        facts |= {"phase": trace.phase, "in_flight": len(trace.jobs), "breadcrumb": "torn" if trace.torn else "whole"}
        facts |= {"pid": trace.pid, "model": trace.model}
    if burial is not None:
        facts |= {"suspects": list(burial.suspects), "failed": list(burial.failed)}
    logger.error("worker_process_died", extra=facts)
