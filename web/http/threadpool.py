"""Heavy work beside the event loop, so that it does not hold every stream of the process.

A thread helps where its work lets go of the interpreter, as Python code does every few milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final, NoReturn, TypeVar

import gevent
from gevent.threadpool import ThreadPool

T = TypeVar("T")

LARGE: Final = 64 * 2**10
"""Bytes from which work is worth a thread."""


def run_in_threadpool(size: int, work: Callable[[], T]) -> T:
    """What `work` gives, or raises; done in a thread when it is about so many bytes.

    Nothing bounds the wait but the work itself, which therefore must: parsing, hashing and decoding of a body do.
    """
    if size < LARGE:
        return work()
    done: Callable[[], T] = gevent.get_hub().threadpool.apply(_tried, (work,))
    return done()


def run_with_timeout(seconds: float, pool: ThreadPool, work: Callable[[], T]) -> T:
    """The same in a thread of `pool`.

    Raises:
        TimeoutError: there is no answer in time. The thread goes on, and is the pool's again when it is done.
    """
    with gevent.Timeout(seconds, TimeoutError("no answer in time")):
        done: Callable[[], T] = pool.apply(_tried, (work,))
    return done()


def _tried(work: Callable[[], T]) -> Callable[[], T]:
    """What gives or raises what `work` did: gevent prints an exception that leaves the thread, whoever catches it."""
    try:
        result = work()
    except Exception as error:  # noqa: BLE001 -- raised again by `run_in_threadpool`
        return partial(_raise, error)
    return lambda: result


def _raise(error: Exception) -> NoReturn:
    raise error
