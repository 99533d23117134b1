"""Run CPU-bound work in a thread, so that it blocks neither the event loop nor the streams of the process.

A thread helps only if the work releases the GIL; pure Python code does so every few milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final, NoReturn, TypeVar

import gevent
from gevent.threadpool import ThreadPool

T = TypeVar("T")

LARGE: Final = 64 * 2**10
"""Input size in bytes from which a thread is worth its cost."""


def run_in_threadpool(size: int, work: Callable[[], T]) -> T:
    """Return or raise what `work` returns or raises; run it in a thread if its input has `LARGE` bytes or more.

    There is no timeout. The work must be bounded by its input, as parsing, hashing and decoding are.

    Args:
        size: size of the input in bytes.
    """
    if size < LARGE:
        return work()
    outcome: Callable[[], T] = gevent.get_hub().threadpool.apply(_captured, (work,))
    return outcome()


def run_with_timeout(timeout_s: float, pool: ThreadPool, work: Callable[[], T]) -> T:
    """Return or raise what `work` returns or raises in a thread of `pool`.

    Raises:
        TimeoutError: the work has not finished in time. It continues and occupies its thread until it ends.
    """
    with gevent.Timeout(timeout_s, TimeoutError("the work did not finish in time")):
        outcome: Callable[[], T] = pool.apply(_captured, (work,))
    return outcome()


def _captured(work: Callable[[], T]) -> Callable[[], T]:
    """Run `work` and return a function that repeats its outcome.

    gevent prints any exception that leaves a pool thread, even if the caller handles it.
    """
    try:
        result = work()
    except Exception as error:  # noqa: BLE001 -- raised again in the caller's greenlet
        return partial(_raise, error)
    return lambda: result


def _raise(error: Exception) -> NoReturn:
    raise error
