"""Facts about the queue's Redis: whether it answers, how durable and how fast it is."""

from __future__ import annotations

import statistics
import time
from contextlib import suppress
from typing import Any, Final

import redis

from scripts.diagnosis.report import Section, size
from scripts.stack.failure import StartFailed
from scripts.stack.preflight import check_broker, redis_faults
from shared.redis.client import Redis, connect
from shared.redis.durability import why_unproven
from shared.settings import Settings

_TIMEOUT_S: Final = 2.0
_PINGS: Final = 20
_SLOW_S: Final = 0.02
"""Median round trip above which each step of a decode batch visibly waits for Redis."""
_INFO: Final = {
    "redis_version": "version",
    "valkey_version": "Valkey version",
    "redis_mode": "mode",
    "role": "role",
    "connected_clients": "clients",
}
_CONFIG: Final = ("appendonly", "appendfsync", "save", "maxmemory-policy")


def check_redis(settings: Settings) -> Section:
    """Report the server of REDIS_URL, or the embedded one, and the broker if it is another server."""
    section = Section("Redis")
    section.facts["server"] = "embedded Valkey" if settings.embedded_redis else "REDIS_URL"
    if settings.embedded_redis and not settings.redis_socket.exists():
        section.facts["state"] = "not running; scripts/serve starts it"
    else:
        _check_server(settings, section)
    if settings.broker_url:
        section.facts["broker"] = "BROKER_URL"
        try:
            check_broker(settings)
        except StartFailed as failure:
            section.problems.append(f"{failure}; correct BROKER_URL or start that server")
    return section


def _check_server(settings: Settings, section: Section) -> None:
    try:
        with connect(settings.store_url, timeout_s=_TIMEOUT_S, retries=0) as client:
            section.facts["latency"] = _latency(client, section)
            section.facts |= _server_facts(client)
            section.problems += [str(fault) for fault in redis_faults(client, settings)]
            if settings.durable and (unproven := why_unproven(client)):
                section.problems.append(unproven)
    except (redis.RedisError, ValueError, OSError) as error:
        section.facts["state"] = "unreachable"
        section.problems.append(_unreachable(settings, error))


def _unreachable(settings: Settings, error: Exception) -> str:
    if isinstance(error, redis.AuthenticationError):
        return "REDIS_URL: the server rejects the user or the password; correct REDIS_URL"
    remedy = "restart scripts/serve" if settings.embedded_redis else "start that server, or correct REDIS_URL"
    return f"Redis cannot be used ({error}): {remedy}"


def _latency(client: Redis, section: Section) -> str:
    client.ping()  # includes the time to connect
    times = sorted(_timed_ping(client) for _ in range(_PINGS))
    median, slowest = statistics.median(times), times[-1]
    if median > _SLOW_S:
        section.problems.append(f"a round trip to Redis takes {median * 1000:.0f} ms: move it closer to the workers")
    return f"{median * 1000:.2f} ms median, {slowest * 1000:.2f} ms maximum of {_PINGS} round trips"


def _timed_ping(client: Redis) -> float:
    started = time.perf_counter()
    client.ping()
    return time.perf_counter() - started


def _server_facts(client: Redis) -> dict[str, str]:
    """Return what the user's ACL rule lets us see."""
    info: dict[str, Any] = {}
    config: dict[str, str] = {}
    with suppress(redis.ResponseError):
        info = client.info()
    for name in _CONFIG:
        with suppress(redis.ResponseError):  # managed servers hide their configuration
            config |= client.config_get(name)
    facts = {label: str(info[name]) for name, label in _INFO.items() if name in info}
    facts |= {name: config.get(name) or ("none" if name in config else "hidden") for name in _CONFIG}
    if "used_memory" in info:
        limit = int(info.get("maxmemory", 0))
        facts["memory"] = f"{size(int(info['used_memory']))} of {size(limit) if limit else 'unlimited'}"
    return facts
