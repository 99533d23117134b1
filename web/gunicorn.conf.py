# ruff: noqa: ARG001, N999 -- names are gunicorn's
"""Configuration of gunicorn: `gunicorn -c web/gunicorn.conf.py 'web.app:create_app()'` in the repository's root."""

import hashlib
import os
import resource
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import gevent

from shared.load_settings import load_or_exit
from shared.runtime import freeze_garbage_collector, pause_garbage_collector
from web.access.api_keys import LOCAL_SCOPES, KeyFileDamaged, KeyStore
from web.http.connection import KEEPALIVE_S
from web.http.server import SPARE_CONNECTIONS

_REVOCATION_CHECK_S = 1.0
_TOKENIZERS_WITHIN_S = 60.0
_settings = load_or_exit()

# Processes share their metrics through memory-mapped files. These are in memory where possible, because writing to a
# mapped file on a full disk ends the process.
_shared_memory = Path("/dev/shm")  # noqa: S108 - the folder in it is created with mode 700, or the start fails
_instance = hashlib.sha256(str(_settings.data_dir).encode()).hexdigest()[:12]
_metrics_dir = (
    _shared_memory / f"mlxq-{os.getuid()}-{_instance}" if _shared_memory.is_dir() else _settings.run_dir / "metrics"
)
_multiprocess = _settings.web_workers > 1
if _multiprocess:  # prometheus_client reads the variable when it is imported, in every process
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(_metrics_dir)


def _raise_file_limit(needed: int) -> int:
    """Return the limit of open files, after raising it as far as needed and allowed."""
    # The soft limit of a shell is 256 (macOS) or 1024, but a process may raise it up to the hard limit.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    if soft != resource.RLIM_INFINITY and soft < limit:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    return limit if soft == resource.RLIM_INFINITY else max(soft, limit)


_host = f"[{_settings.host}]" if ":" in _settings.host else _settings.host
bind = f"{_host}:{_settings.port}"
workers = _settings.web_workers
worker_class = "web.http.server.Worker"
_spare_files = 256  # descriptors for everything that is not a client's connection
_connections = min(4096, _raise_file_limit(4096 + SPARE_CONNECTIONS + _spare_files) - SPARE_CONNECTIONS - _spare_files)
worker_connections = max(_connections, 1) + SPARE_CONNECTIONS  # each stream occupies one, and a file descriptor
backlog = 2048
keepalive = round(KEEPALIVE_S)
sendfile = False  # it would pass by the time limit for sending
timeout = 60
graceful_timeout = max(1, round(_settings.drain_s))
control_socket_disable = True
# gunicorn trusts headers of proxies on this machine by default. `web.http.environ` reads those that are trusted.
forwarded_allow_ips = ""
forwarder_headers = ""
secure_scheme_headers: dict[str, str] = {}
os.environ.pop("SCRIPT_NAME", None)  # a prefix that every path must have
logger_class = "web.http.access_log.JsonLogger"


def on_starting(server: Any) -> None:
    shutil.rmtree(_metrics_dir, ignore_errors=True)
    if _multiprocess:
        _metrics_dir.mkdir(mode=0o700, parents=True)
    key = _settings.mlxq_api_key.get_secret_value()
    if key:
        try:
            KeyStore(_settings.keys_file).ensure(key, "local", LOCAL_SCOPES)
        except KeyFileDamaged as error:
            raise SystemExit(str(error)) from error
        except (OSError, ValueError) as error:
            raise SystemExit(f"MLXQ_API_KEY cannot be used: {error}") from error


def post_fork(server: Any, worker: Any) -> None:
    pause_garbage_collector()  # while the application is imported


def post_worker_init(worker: Any) -> None:
    services = worker.wsgi.extensions["mlxq"]
    services.events.start()
    services.maintenance.start(lambda: worker.alive)
    gevent.spawn(_close_when_stopping, worker, services.hub)
    gevent.spawn(_abort_revoked, services)
    gevent.spawn(_load_tokenizers, worker, services)
    freeze_garbage_collector()


def worker_exit(server: Any, worker: Any) -> None:
    app = getattr(worker, "wsgi", None)  # missing if the process could not start
    if app is not None and (tracer := app.extensions["mlxq"].tracer) is not None:
        tracer.close()


def child_exit(server: Any, worker: Any) -> None:
    if _multiprocess:
        from prometheus_client.multiprocess import mark_process_dead

        mark_process_dead(worker.pid)  # type: ignore[no-untyped-call]


def on_exit(server: Any) -> None:
    shutil.rmtree(_metrics_dir, ignore_errors=True)


def _close_when_stopping(worker: Any, hub: Any) -> None:
    # gunicorn has no hook for the beginning of a graceful stop. It would wait for idle connections and cut the streams.
    while worker.alive:
        gevent.sleep(0.1)
    hub.close()
    worker.close_idle_connections()


def _abort_revoked(services: Any) -> None:
    while True:
        gevent.sleep(_REVOCATION_CHECK_S)
        services.open_responses.abort_revoked(services.keys)


def _load_tokenizers(worker: Any, services: Any) -> None:
    from redis import RedisError  # imported before gevent patches ssl, its connections would block

    # Otherwise the first prompt waits for the helper process. A model that is loaded later loads its tokenizer with its
    # first prompt.
    until = time.monotonic() + _TOKENIZERS_WITHIN_S
    while worker.alive and time.monotonic() < until:
        with suppress(RedisError):
            models = {each.model for each in services.registry.workers()}
            cards = services.registry.models()
            if services.prompt_tokenizer.load(card for card in cards.values() if card.id in models):
                return
        gevent.sleep(1)
