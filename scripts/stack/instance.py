"""One stack per DATA_DIR: the lock that says so."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from scripts.stack.failure import StartFailed


@contextmanager
def sole_instance(lock: Path, url: str) -> Iterator[None]:
    """Hold the lock, with who holds it written inside. The kernel frees it however this process ends.

    Raises:
        StartFailed: another process holds it.
    """
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 1000).decode() or "it is just starting"
            raise StartFailed(f"already running in {lock.parent.parent} ({holder}); nothing was changed") from None
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, f"pid {os.getpid()}, {url}".encode(), 0)
        yield
    finally:
        os.close(descriptor)
