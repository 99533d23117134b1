"""What the service needs from Redis, checked when a process starts and while it runs.

A server that evicts keys loses accepted jobs, and a user without the necessary permissions fails in the middle of a
job. Neither shows when a process connects. So the server and the user are examined before a job is accepted. Whether
Redis writes jobs to disk is checked in `shared.redis.durability`.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias

from redis.exceptions import NoPermissionError, ResponseError

from shared.errors import RedisUnsuitable
from shared.redis import keys
from shared.redis.client import SCRIPTS, Redis, passes

MIN_VERSION: Final = (7, 0)
"""The scripts use the flag `allow-oom`, which older servers do not have. Valkey reports 7.2.4 for compatibility."""
CHECK_S: Final = 1.0
"""How long the result of a check is used."""
_RETRY_S: Final = 10

KEY_PATTERNS: Final = ("mlxq*", "LIMITS*", "_kombu*", "*celery*")
"""Patterns of all keys of the queue, the rate limiter and the broker, for an ACL rule."""
_KEY: Final = "KEY"
_PROBES: Final = (("HINCRBY", _KEY, "field", "1"), ("LPOP", _KEY), ("RPOP", _KEY))
"""Commands that need permission to read and to write a key."""
_PUBSUB: Final = frozenset({"PUBLISH", "SUBSCRIBE", "PSUBSCRIBE"})
_CHANNELS: Final = ("LIVE", "DONE")
_READS: Final = (
    "EXISTS",
    "GET",
    "HGETALL",
    "HKEYS",
    "HLEN",
    "HVALS",
    "MGET",
    "PTTL",
    "SCARD",
    "SMEMBERS",
    "TTL",
    "ZCARD",
)
_WRITES: Final = ("DEL", "LPOP", "PERSIST", "UNLINK")
_COMMANDS: Final[tuple[tuple[str, ...], ...]] = (
    *((name, _KEY) for name in (*_READS, *_WRITES)),
    ("APPEND", _KEY, "text"),
    ("EXPIRE", _KEY, "1"),
    ("HDEL", _KEY, "field"),
    ("HEXISTS", _KEY, "field"),
    ("HGET", _KEY, "field"),
    ("HINCRBY", _KEY, "field", "1"),
    ("HINCRBYFLOAT", _KEY, "field", "1"),
    ("HMGET", _KEY, "field"),
    ("HSET", _KEY, "field", "value"),
    ("HSETNX", _KEY, "field", "value"),
    ("HSTRLEN", _KEY, "field"),
    ("INCRBY", _KEY, "1"),
    ("LINDEX", _KEY, "0"),
    ("LRANGE", _KEY, "0", "1"),
    ("LTRIM", _KEY, "0", "1"),
    ("PEXPIRE", _KEY, "1"),
    ("PEXPIREAT", _KEY, "1"),
    ("RPUSH", _KEY, "value"),
    ("SADD", _KEY, "member"),
    ("SET", _KEY, "value"),
    ("SREM", _KEY, "member"),
    ("XADD", _KEY, "1-0", "field", "value"),
    ("XRANGE", _KEY, "-", "+"),
    ("XREVRANGE", _KEY, "+", "-"),
    ("ZADD", _KEY, "1", "member"),
    ("ZCOUNT", _KEY, "0", "1"),
    ("ZRANGE", _KEY, "0", "1"),
    ("ZRANGEBYSCORE", _KEY, "0", "1"),
    ("ZRANK", _KEY, "member"),
    ("ZREM", _KEY, "member"),
    ("ZREMRANGEBYSCORE", _KEY, "0", "1"),
    ("ZSCORE", _KEY, "member"),
    ("EVALSHA", "0" * 40, "0"),
    ("SCRIPT", "LOAD", "return 1"),
    ("SCAN", "0"),
    ("PING",),
    ("PUBSUB", "NUMSUB"),
    ("TIME",),
    *((name, channel) for name in ("PUBLISH", "SUBSCRIBE", "UNSUBSCRIBE") for channel in (keys.LIVE, keys.DONE)),
)
"""Every command that the queue and the rate limiter send, with arguments that are valid for it."""
Process: TypeAlias = Literal["web", "background", "worker"]
"""A kind of process that connects to the queue's Redis. Each may have a Redis user of its own."""

_LIMITS: Final = "LIMITS:"
_KINDS: Final = (
    *sorted(
        value
        for name, value in vars(keys).items()
        if name.isupper() and value.startswith("mlxq:") and name not in _CHANNELS
    ),
    _LIMITS,
)
"""One key of each kind: the prefixes are valid keys too."""
_OF_THE_API: Final = frozenset({_LIMITS, keys.SESSION})
"""Kinds of keys that only the API uses."""
_NOT_OF_WORKERS: Final = _OF_THE_API | {
    *(keys.BATCH, keys.BATCHES, keys.BATCH_COUNTS, keys.UNFINISHED_BATCHES),
    *(keys.RESPONSE, keys.RESPONSES, keys.UNANSWERED),
    *(keys.WEBHOOK, keys.WEBHOOK_SECRETS, keys.WEBHOOKS_DUE, keys.WEBHOOKS_DEAD),
    *(keys.LEADER, keys.SAMPLES, keys.ARCHIVE, keys.PURGES),
}
"""Kinds of keys that workers do not use."""

_BROKER_COMMANDS: Final[tuple[tuple[str, ...], ...]] = (
    *((name, _KEY) for name in ("DEL", "EXISTS", "LLEN", "RPOP", "SMEMBERS")),
    ("BRPOP", _KEY, "1"),
    ("EXPIRE", _KEY, "1"),
    ("LPUSH", _KEY, "value"),
    ("SADD", _KEY, "member"),
    ("SREM", _KEY, "member"),
    ("ZADD", _KEY, "1", "member"),
    ("ZRANGEBYSCORE", _KEY, "0", "1"),
    ("ZREM", _KEY, "member"),
    ("EVALSHA", "0" * 40, "0"),
    ("SCRIPT", "LOAD", "return 1"),
    ("TIME",),
    ("PING",),
    ("MULTI",),
    ("EXEC",),
    ("PUBLISH", "/0.celeryev"),
    ("PSUBSCRIBE", "/0.celeryev"),
    ("PUNSUBSCRIBE", "/0.celeryev"),
    ("SUBSCRIBE", "/0.celeryev"),
    ("UNSUBSCRIBE", "/0.celeryev"),
)
"""Every command that kombu sends with the service's options."""
_BROKER_KINDS: Final = ("_kombu.binding.", "mlxq.wakeups.", "node.celery.pidbox", "celeryev.")


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that makes Redis unsuitable.

    Attributes:
        text: a sentence that says what to change.
        fatal: whether workers cannot run. If not, jobs that were accepted before still run.
    """

    text: str
    fatal: bool = True

    def __str__(self) -> str:
        return self.text


def used_kinds(process: Process) -> tuple[str, ...]:
    """Return a key of each kind that a process uses."""
    unused = {"web": frozenset(), "background": _OF_THE_API, "worker": _NOT_OF_WORKERS}[process]
    return tuple(kind for kind in _KINDS if kind not in unused)


def find_faults(client: Redis, *, broker: bool = False, process: Process = "web") -> list[Fault]:
    """Return why this Redis must not hold jobs.

    Args:
        broker: whether it is Celery's broker, too.
        process: the kind of process whose permissions are checked. `web` has those of all others.

    Raises:
        redis.RedisError: Redis is unreachable.
    """
    try:
        info = _server_info(client)
    except NoPermissionError:
        return [Fault("The Redis user may not run INFO: add +info to its ACL rule.")]
    version = tuple(map(int, re.findall(r"\d+", str(info["redis_version"]))[:2]))
    if version < MIN_VERSION:
        return [Fault(f"Redis {info['redis_version']} is too old: use Redis 7.0 or later, or Valkey.")]
    faults = [*_mode_faults(info), *_denied(client, _COMMANDS, used_kinds(process))]
    return faults + find_broker_faults(client) if broker else faults


def find_broker_faults(client: Redis) -> list[Fault]:
    """Return why this Redis cannot be Celery's broker.

    Raises:
        redis.RedisError: Redis is unreachable.
    """
    return _denied(client, _BROKER_COMMANDS, _BROKER_KINDS)


def broker_commands() -> frozenset[str]:
    """Return the names of all commands that Celery and Flower send."""
    return frozenset(command[0] for command in _BROKER_COMMANDS)


def checked_commands() -> frozenset[str]:
    """Return the names of all commands whose permission is checked."""
    return frozenset(command[0] for command in (*_COMMANDS, *_BROKER_COMMANDS))


class Requirements:
    """Checks Redis before jobs are accepted, at most once a second."""

    def __init__(self, client: Redis, process: Process = "web") -> None:
        self._client = client
        self._process: Process = process
        self._lock = threading.Lock()
        self._checked_at = float("-inf")
        self._faults: list[Fault] = []

    def check(self) -> None:
        """Return if Redis may hold jobs.

        Raises:
            RedisUnsuitable: it must not; the message says what to change.
            redis.RedisError: Redis is unreachable.
        """
        with self._lock:
            if time.monotonic() - self._checked_at >= CHECK_S:
                self._faults = find_faults(self._client, process=self._process)
                self._checked_at = time.monotonic()
            faults = self._faults
        if faults:
            raise RedisUnsuitable(" ".join(["No job is accepted.", *map(str, faults)]), retry_after=_RETRY_S)


def _server_info(client: Redis) -> dict[str, Any]:
    with client.pipeline(transaction=False) as pipe:
        for section in ("server", "memory", "cluster"):
            pipe.info(section)
        server, memory, cluster = pipe.execute()
    return {**server, **memory, **cluster}


def _mode_faults(info: dict[str, Any]) -> list[Fault]:
    faults = []
    policy = info.get("maxmemory_policy", "")
    if policy != "noeviction":
        detail = f"Redis may evict jobs (maxmemory-policy {policy}): set maxmemory-policy noeviction."
        faults.append(Fault(detail, fatal=False))
    if info.get("cluster_enabled"):
        faults.append(Fault("Redis Cluster is not supported: set cluster-enabled no, or use another server."))
    return faults


def _denied(client: Redis, commands: Iterable[Sequence[str]], kinds: Sequence[str]) -> list[Fault]:
    """Return which keys and commands the user's ACL rule denies."""
    request = {"keys": kinds, "probes": _PROBES, "commands": list(commands)}
    try:
        script = "#!lua flags=allow-oom\n" + (SCRIPTS / "permissions.lua").read_text()
        reply = client.eval(script, 0, json.dumps(request))
    except NoPermissionError:
        return [Fault("The Redis user may not run scripts: add +@scripting to its ACL rule.")]
    except ResponseError as error:
        if passes(error):
            raise
        return [Fault("Redis cannot run Lua scripts: enable EVAL, and use Redis 7.0 or later, or Valkey.")]
    denied_keys, denied_commands = map(json.loads, reply)
    return [*_key_faults(denied_keys), *_command_faults(sorted({*denied_commands}))]


def _key_faults(denied: list[str]) -> list[Fault]:
    if not denied:
        return []
    examples = ", ".join(denied[:3]) + (", …" if len(denied) > 3 else "")
    patterns = " ".join(f"~{pattern}" for pattern in KEY_PATTERNS)
    return [Fault(f"The Redis user may not use the keys {examples}: add {patterns} to its ACL rule.")]


def _command_faults(denied: list[str]) -> list[Fault]:
    if not denied:
        return []
    rules = [f"+{name.lower()}" for name in denied]
    if not _PUBSUB.isdisjoint(denied):
        rules.append("&*")
    return [Fault(f"The Redis user may not run {', '.join(denied)}: add {' '.join(rules)} to its ACL rule.")]
