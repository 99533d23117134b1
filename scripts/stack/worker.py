"""`scripts/worker`: checks that the queue can be used, then becomes the launcher of one worker.

A worker that is running waits for a Redis that is away. At the start, an unusable Redis is probably a wrong setting.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import NoReturn

import redis

from scripts.stack import preflight
from scripts.stack.failure import StartFailed
from shared.load_settings import load_or_exit
from shared.redis.client import connect
from shared.settings import ENV_FILE, Settings

RETRY_S = 8.0
"""How long an unreachable Redis is retried: its machine may be starting too."""
_TIMEOUT_S = 2.0
_PAUSE_S = 0.5


def main() -> NoReturn:
    """Become the launcher, or exit with one line that names the setting and the fix."""
    settings = load_or_exit()
    try:
        check_redis(settings)
        preflight.check_broker(settings)
    except StartFailed as failure:
        sys.exit(f"worker: {failure}")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as the executables do, see scripts/lib/run.py
    os.execv(sys.executable, [sys.executable, "-P", "-m", "scripts.lib.run", "worker.process.launcher"])


def check_redis(settings: Settings) -> None:
    """Check that the queue's Redis can be used; retry for `RETRY_S` if it is unreachable.

    Raises:
        StartFailed: it cannot be used.
    """
    if settings.embedded_redis and not settings.redis_socket.exists():
        raise StartFailed(
            f"REDIS_URL is not set, and no scripts/serve is running with DATA_DIR {settings.data_dir}: "
            f"set REDIS_URL to the Redis of the stack, in the environment or {ENV_FILE}"
        )
    deadline = time.monotonic() + RETRY_S
    while True:
        try:
            faults = _fatal_faults(settings)
            break
        except (redis.RedisError, ValueError, OSError) as error:
            if not _is_transient(error) or time.monotonic() > deadline:
                reason = f"REDIS_URL cannot be used: {error} Correct it in the environment or {ENV_FILE}"
                raise StartFailed(reason) from None
        time.sleep(_PAUSE_S)  # nothing reports that Redis has become reachable
    if faults:
        raise StartFailed(f"REDIS_URL: {faults}")


def _fatal_faults(settings: Settings) -> str:
    with connect(settings.store_url, timeout_s=_TIMEOUT_S, retries=0) as client:
        faults = preflight.redis_faults(client, settings, "worker")
        return " ".join(str(fault) for fault in faults if fault.fatal)


def _is_transient(error: Exception) -> bool:
    refused = (redis.AuthenticationError, redis.exceptions.AuthorizationError)
    return isinstance(error, redis.ConnectionError | redis.TimeoutError) and not isinstance(error, refused)


if __name__ == "__main__":
    main()
