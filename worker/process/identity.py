"""The name of a worker process, the same in Celery, the registry, leases, logs and metrics.

A supervisor numbers its workers with `MLXQ_WORKER_INDEX`: worker 0 is `worker-0-3f2a1c@host` after every restart. A
process without a number takes the lowest free `standalone-0`, `standalone-1`, … No two living processes share a name,
and restarts create no new names, so the metrics' `worker` label has few values.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Final

from shared.settings import Settings
from worker.process.breadcrumb import Breadcrumb, breadcrumb_path, is_taken

logger = logging.getLogger(__name__)

SUPERVISED: Final = "worker"
STANDALONE: Final = "standalone"
CLAIM_S: Final = 5.0
"""Longest wait for other processes that are choosing their names."""


@dataclass(frozen=True, slots=True)
class Identity:
    """The identity of a worker process.

    Attributes:
        label: distinguishes it from the other workers of its host and DATA_DIR, such as `worker-0`; part of file names.
        name: unique among all workers of the queue; Celery's node name.
        breadcrumb: its lock reserves the label.
    """

    label: str
    name: str
    breadcrumb: Breadcrumb


def worker_index() -> int | None:
    """The number that the supervisor gave this process; None without one."""
    index = os.environ.get("MLXQ_WORKER_INDEX")
    return int(index) if index else None


def process_name(settings: Settings, label: str) -> str:
    """The name of the process with this label. Several DATA_DIRs of one host may serve the same queue."""
    data_dir = hashlib.sha256(str(settings.data_dir).encode()).hexdigest()[:6]
    return f"{label}-{data_dir}@{socket.gethostname()}"


def claim_identity(settings: Settings, index: int | None, token: str) -> Identity:
    """Take a name for this process.

    If an earlier process with the same index is still draining, wait for it: the models of this one need its memory.
    If that takes too long, take the name of a process without an index.

    Args:
        token: distinguishes this start of a process from others.
    """
    drained_by = time.monotonic() + settings.drain_s + CLAIM_S
    try:
        settings.create_run_dir()
        label, breadcrumb = _claim(settings.run_dir, index, token, drained_by)
    except OSError as error:  # such as a full disk
        logger.warning("breadcrumb_not_written", extra={"reason": str(error)})
        label = f"{STANDALONE}-{token}" if index is None else f"{SUPERVISED}-{index}"
        breadcrumb = Breadcrumb(None)
    return Identity(label, process_name(settings, label), breadcrumb)


def _claim(folder: Path, index: int | None, token: str, drained_by: float) -> tuple[str, Breadcrumb]:
    while index is not None and time.monotonic() < drained_by:
        with _choosing(folder):
            if not is_taken(folder, label := f"{SUPERVISED}-{index}"):
                return label, Breadcrumb(breadcrumb_path(folder, label, token))
        time.sleep(0.1)
    with _choosing(folder):
        label = next(free for n in count() if not is_taken(folder, free := f"{STANDALONE}-{n}"))
        return label, Breadcrumb(breadcrumb_path(folder, label, token))


@contextmanager
def _choosing(folder: Path) -> Iterator[None]:
    """Let one process at a time choose its label.

    Raises:
        OSError: the lock file cannot be written, or another process keeps it locked.
    """
    folder.mkdir(parents=True, exist_ok=True)
    give_up_at = time.monotonic() + CLAIM_S
    with (folder / "names.lock").open("a") as file:
        while not _try_lock(file.fileno()):
            if time.monotonic() > give_up_at:
                raise TimeoutError(f"another process keeps {file.name} locked")
            time.sleep(0.01)
        yield


def _try_lock(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
