"""Probes of the stack's services while it starts: they return whether a service answers, and never raise."""

from __future__ import annotations

import http
import http.client
import json
import urllib.parse
from collections.abc import Mapping
from typing import Any

import redis

from shared.models.registry import Registry
from shared.redis.client import connect
from shared.settings import Settings

_TIMEOUT_S = 2.0


def is_ok(url: str) -> bool:
    """Whether a GET request is answered with 200."""
    return _get(url)[0] == http.HTTPStatus.OK


def health_reasons(base_url: str, key: str) -> str:
    """Return why the API is not ready, as `/health` reports it; empty if it does not answer."""
    status, body = _get(f"{base_url}/health", {"X-API-Key": key})
    try:
        report = json.loads(body) if status else {}
    except ValueError:
        return ""
    reasons = report.get("reasons", ()) if isinstance(report, Mapping) else ()
    return " ".join(map(str, reasons))


def redis_answers(settings: Settings) -> bool:
    """Whether the queue's Redis answers commands."""
    try:
        with _connect(settings) as client:
            return bool(client.ping())
    except redis.RedisError:
        return False


def redis_is_loading(settings: Settings) -> bool:
    """Whether the queue's Redis is still reading its data from disk."""
    try:
        with _connect(settings) as client:
            client.ping()
    except redis.BusyLoadingError:
        return True
    except redis.RedisError:
        pass
    return False


def worker_is_loading(settings: Settings) -> bool:
    """Whether a worker is loading a model."""
    try:
        with _connect(settings) as client:
            return any(worker.state == "loading" for worker in Registry(client).workers())
    except redis.RedisError:
        return False


def _connect(settings: Settings) -> Any:
    return connect(settings.store_url, timeout_s=_TIMEOUT_S, retries=0)


def _get(url: str, headers: Mapping[str, str] | None = None) -> tuple[int, bytes]:
    """Return status and body of a response; status 0 if there is none."""
    parts = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=_TIMEOUT_S)
    try:
        connection.request("GET", parts.path, headers=headers or {})
        response = connection.getresponse()
        return response.status, response.read()
    except (OSError, http.client.HTTPException):
        return 0, b""
    finally:
        connection.close()
