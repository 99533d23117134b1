"""The connection to Redis, and the Lua scripts that are all of the queue's logic.

Every change of a job's state is one script, so it happens whole or not at all.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Final, TypeAlias

import redis
from redis import exceptions
from redis.backoff import ExponentialBackoff
from redis.retry import Retry

from shared.queue.keys import LUA_TABLE
from shared.queue.redis_url import is_sentinel, parse_sentinel
from shared.queue.sentinel import master_pool

POOL_WAIT_S = 5.0
"""Longest wait for a free connection. Longer than calls take: a burst is no outage."""

SCRIPTS = Path(__file__).parent / "scripts"
_USES: Final = "-- uses:"

_PASSING = (
    exceptions.ConnectionError,  # also while it loads its data
    exceptions.TimeoutError,
    exceptions.OutOfMemoryError,
    exceptions.ReadOnlyError,
    exceptions.TryAgainError,
    exceptions.ClusterDownError,
)
_PASSING_WORDS = ("MISCONF ", "BUSY ", "NOREPLICAS ")
"""How errors begin that redis-py has no class for."""

Redis: TypeAlias = Any
"""A client. redis-py's annotations cannot tell one that decodes its answers from one that does not, so that every
call would need a cast; the functions here say what they return instead."""


def connect(url: str, *, timeout_s: float = 5.0, retries: int = 3, connections: int = 64, **options: Any) -> Redis:
    """A client with a pool, text in and out.

    Args:
        url: in redis-py's form, or that of `shared.queue.redis_url` for the master that sentinels know.
        timeout_s: bound on connecting and on each call, in seconds.
        retries: times a call is sent again when the connection breaks. The scripts are safe to send twice.
        connections: most calls under way at once; further ones wait their turn.
        options: of redis-py's connections, such as `decode_responses=False` for bytes.
    """
    options = {
        "max_connections": connections,
        "timeout": POOL_WAIT_S,
        "decode_responses": True,
        "socket_timeout": timeout_s,
        "socket_connect_timeout": timeout_s,
        "retry": Retry(ExponentialBackoff(cap=0.5, base=0.02), retries),
        "health_check_interval": 30,
        **options,
    }
    if is_sentinel(url):
        return redis.Redis.from_pool(master_pool(parse_sentinel(url), timeout_s, **options))
    return redis.Redis.from_pool(redis.BlockingConnectionPool.from_url(url, **options))


def passes(error: exceptions.RedisError) -> bool:
    """Whether Redis is away or takes nothing for the time being, so that the same call will be answered later.

    If not, the call itself is at fault, such as a script that raises, and sending it again changes nothing.
    """
    return isinstance(error, _PASSING) or str(error).startswith(_PASSING_WORDS)


ACCEPTANCE: Final = "enqueue"
"""The one script that is refused when Redis's memory is full: all others let jobs end."""


@cache
def source(name: str) -> str:
    """The whole text of a script: key prefixes, `lib/job.lua`, the libraries that its `-- uses:` line names, itself."""
    body = (SCRIPTS / f"{name}.lua").read_text()
    first = body.partition("\n")[0]
    libraries = first.removeprefix(_USES).split() if first.startswith(_USES) else []
    parts = [(SCRIPTS / "lib" / f"{library}.lua").read_text() for library in ("job", *libraries)]
    flags = "" if name == ACCEPTANCE else "#!lua flags=allow-oom\n"
    return flags + LUA_TABLE + "".join(parts) + body


def has_memory(client: Redis) -> bool:
    """Whether Redis has memory for what needs some.

    Raises:
        redis.RedisError: Redis is away.
    """
    try:
        client.eval("#!lua\nreturn 1", 0)  # with its first line, and no flag there, it is refused beforehand
    except exceptions.OutOfMemoryError:
        return False
    return True


def script(client: Redis, name: str) -> Callable[..., Any]:
    """The script `shared/queue/scripts/{name}.lua`, to be called with `args=[…]`."""
    registered: Callable[..., Any] = client.register_script(source(name))
    return registered
