"""The connection to Redis, and the Lua scripts that implement the queue.

Every change of a job's state is one script call, so it is atomic.
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

from shared.redis.keys import LUA_TABLE
from shared.redis.sentinel import master_pool
from shared.redis.urls import SentinelUrl, ServerUrl, parse

POOL_WAIT_S = 5.0
"""Maximum wait for a free connection. It exceeds the duration of calls, so a burst of calls does not fail."""

SCRIPTS = Path(__file__).parent.parent / "queue/scripts"
_USES: Final = "-- uses:"

_TRANSIENT_ERRORS = (
    exceptions.ConnectionError,  # also raised while Redis loads its data
    exceptions.TimeoutError,
    exceptions.OutOfMemoryError,
    exceptions.ReadOnlyError,
    exceptions.TryAgainError,
    exceptions.ClusterDownError,
)
_TRANSIENT_PREFIXES = ("MISCONF ", "BUSY ", "NOREPLICAS ")
"""Prefixes of transient errors that have no class in redis-py."""

Redis: TypeAlias = Any
"""A Redis client. redis-py's annotations do not distinguish clients that decode replies from clients that return bytes,
so each call would need a cast. The functions that use a client have annotated return types instead."""


def connect(url: str, *, timeout_s: float = 5.0, retries: int = 3, connections: int = 64, **options: Any) -> Redis:
    """Create a client with a bounded pool of connections. By default it decodes replies to text.

    Args:
        url: a URL in one of the forms of `shared.redis.urls`.
        timeout_s: time limit in seconds for connecting and for each call.
        retries: how often a call is repeated after a connection error. The scripts may be sent twice.
        connections: maximum concurrent calls; further calls wait for a free connection.
        options: options of redis-py's connections, such as `decode_responses=False`.
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
    parsed = parse(url)
    if isinstance(parsed, SentinelUrl):
        return redis.Redis.from_pool(master_pool(parsed, timeout_s, **options))
    return redis.Redis.from_pool(redis.BlockingConnectionPool(**_server_options(parsed), **options))  # type: ignore[no-untyped-call]


def _server_options(url: ServerUrl) -> dict[str, Any]:
    options: dict[str, Any] = {"db": url.db, "username": url.login.username, "password": url.login.password}
    if url.path:
        return {**options, "connection_class": redis.UnixDomainSocketConnection, "path": url.path}
    options |= {"host": url.host, "port": url.port}
    if url.tls is None:
        return options
    return {**options, "connection_class": redis.SSLConnection, **url.tls.options()}


def passes(error: exceptions.RedisError) -> bool:
    """Whether an error is transient: Redis is unreachable or rejects calls for now, and a retry may succeed.

    Other errors are caused by the call itself, such as a script that raises; a retry would fail again.
    """
    return isinstance(error, _TRANSIENT_ERRORS) or str(error).startswith(_TRANSIENT_PREFIXES)


def is_denied(error: exceptions.RedisError) -> bool:
    """Whether the user's ACL rule denies the call, or a command in a script."""
    return isinstance(error, exceptions.NoPermissionError) or str(error).startswith("ACL failure in script")


_ENQUEUE: Final = "enqueue"
"""The only script that Redis rejects when its memory is full: the others help jobs to end, which frees memory."""


_LIBRARIES: Final = ("clock", "usage", "events", "queue", "job")
"""The libraries that every script has."""


@cache
def source(name: str) -> str:
    """Assemble a script: key prefixes, the libraries of all scripts, those in its `-- uses:` line, and its own file."""
    body = (SCRIPTS / f"{name}.lua").read_text()
    first_line = body.partition("\n")[0]
    libraries = first_line.removeprefix(_USES).split() if first_line.startswith(_USES) else []
    parts = [(SCRIPTS / "lib" / f"{library}.lua").read_text() for library in (*_LIBRARIES, *libraries)]
    flags = "" if name == _ENQUEUE else "#!lua flags=allow-oom\n"
    return flags + LUA_TABLE + "".join(parts) + body


def has_memory(client: Redis) -> bool:
    """Whether Redis accepts commands that need memory.

    Raises:
        redis.RedisError: Redis is unreachable.
    """
    try:
        client.eval("#!lua\nreturn 1", 0)  # a script with this line and no flags is rejected when memory is full
    except exceptions.OutOfMemoryError:
        return False
    return True


def script(client: Redis, name: str) -> Callable[..., Any]:
    """Load the script `shared/queue/scripts/{name}.lua`; call the result with `args=[…]`."""
    registered: Callable[..., Any] = client.register_script(source(name))
    return registered
