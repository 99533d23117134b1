"""Checks before anything is started. Each failure is one line that names the setting and the fix."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import redis
from pydantic import ValidationError

from scripts.stack.failure import StartFailed
from shared.load_settings import faults, load_settings
from shared.redis.client import Redis, connect
from shared.redis.durability import why_unproven
from shared.redis.requirements import Fault, Process, find_broker_faults, find_faults
from shared.redis.urls import is_redis
from shared.settings import ENV_FILE, ROOT, Settings

MIN_FREE_BYTES = 200 * 2**20
_SOCKET_PATH_MAX = 103 if sys.platform == "darwin" else 107
# supervisord binds its socket under a temporary name: the path, a dot and its process id.
_SOCKET_SUFFIX = len(".4194304")
# Characters with a meaning in supervisord's configuration that cannot be escaped; `?` ends the path of a Redis URL.
_FORBIDDEN_PATH_CHARACTERS = set("%;#\"'\\\n?")


def load_settings_or_fail() -> Settings:
    """Load the settings. ENV_FILE may be missing: the first run creates it.

    Raises:
        StartFailed: with one line per invalid variable.
    """
    try:
        return load_settings(env_file_may_be_missing=True)
    except ValidationError as error:
        raise StartFailed(faults(error)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise StartFailed(f"cannot read {ENV_FILE}: {error}") from None


def prepare_data_dir(settings: Settings) -> None:
    """Create DATA_DIR and its folders; check that they are writable and that sockets' paths fit."""
    folder = settings.data_dir
    for name, path in (("DATA_DIR", folder), ("the repository's path", ROOT)):
        if forbidden := sorted(_FORBIDDEN_PATH_CHARACTERS & set(str(path))):
            characters = " ".join(map(repr, forbidden))
            raise StartFailed(f"{name} {str(path)!r} contains {characters}, which supervisord cannot handle")
    excess = len(os.fsencode(settings.redis_socket)) + _SOCKET_SUFFIX - _SOCKET_PATH_MAX
    if excess > 0:
        raise StartFailed(f"DATA_DIR {folder} is {excess} bytes too long for the path of a Unix socket")
    try:
        settings.create_run_dir()
        for each in (settings.log_dir, folder / "valkey"):
            each.mkdir(mode=0o700, exist_ok=True)
        _write_probe(folder)
    except OSError as error:
        raise StartFailed(f"cannot write to DATA_DIR {folder}: {os.strerror(error.errno or 0)}") from None
    if full := disk_full(folder, MIN_FREE_BYTES):
        raise StartFailed(full)


def disk_full(folder: Path, needed: int) -> str:
    """Return a message if the disk of a folder has fewer free bytes than needed, else an empty string."""
    free = shutil.disk_usage(folder).free
    return f"the disk of DATA_DIR {folder} is full: {free >> 20} MB free, {needed >> 20} MB needed" * (free < needed)


def _write_probe(folder: Path) -> None:
    # A quota or a full file system may show only when blocks are allocated.
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"\0" * 65536)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def single_instance(lock: Path, url: str) -> Iterator[None]:
    """Hold the lock file of a DATA_DIR, with pid and URL written into it. The kernel releases it at any exit.

    Raises:
        StartFailed: another process holds it.
    """
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 1000).decode() or "still starting"
            raise StartFailed(f"already running in {lock.parent.parent} ({holder}); nothing was changed") from None
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, f"pid {os.getpid()}, {url}".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def check_ports(settings: Settings) -> None:
    """Check that the ports of the API and Flower are free."""
    if settings.port == settings.flower_port:
        raise StartFailed(f"PORT and FLOWER_PORT are both {settings.port}")
    _check_port("HOST", settings.host, "PORT", settings.port)
    _check_port("FLOWER_HOST", settings.flower_host, "FLOWER_PORT", settings.flower_port)


def _check_port(host_name: str, host: str, port_name: str, port: int) -> None:
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror:
        raise StartFailed(f"{host_name} {host} is not an address of this machine") from None
    with socket.socket(family, kind) as probe:
        # The servers set it too: connections of an earlier run in TIME_WAIT do not block the port.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise StartFailed(port_taken(port_name, port)) from None
            raise StartFailed(f"cannot listen on {host} port {port}: {os.strerror(error.errno or 0)}") from None


def port_taken(name: str, port: int) -> str:
    """Return the message for a port that another process listens on; `name` is its variable."""
    return f"port {port} is taken; set {name} to another one in {ENV_FILE}"


def check_redis(settings: Settings) -> None:
    """Check that an external Redis responds, fulfils the requirements, and writes jobs to disk."""
    if settings.embedded_redis:
        return
    try:
        with connect(settings.store_url, timeout_s=5, retries=0) as client:
            faults = redis_faults(client, settings)
            unproven = why_unproven(client) if settings.durable and not faults else ""
    except (redis.RedisError, ValueError, OSError) as error:
        raise StartFailed(f"REDIS_URL cannot be used: {error}") from None
    if faults:
        raise StartFailed(f"REDIS_URL: {' '.join(map(str, faults))}")
    if unproven:
        raise StartFailed(f"REDIS_URL: {unproven} To accept jobs all the same, set DURABLE=false")


def redis_faults(client: Redis, settings: Settings, process: Process = "web") -> list[Fault]:
    """Return why this Redis must not hold jobs, or which permission a process lacks.

    Raises:
        redis.RedisError: Redis is unreachable.
    """
    client.ping()
    faults = find_faults(client, broker=not settings.broker_url, process=process)
    if not faults and client.info("replication").get("role") != "master":
        return [Fault("This Redis is a read-only replica: use the URL of its master, or a sentinel:// URL.")]
    return faults


def check_broker(settings: Settings) -> None:
    """Check that a separate broker answers and permits what Celery does."""
    if not settings.broker_url:
        return
    from shared.queue.wakeups import make_app

    try:
        with make_app(settings, hasty=True).connection_for_write() as connection:
            connection.connect()
        faults = _broker_faults(settings.celery_url)
    except Exception as error:  # noqa: BLE001 - each kombu transport raises its own errors
        raise StartFailed(f"BROKER_URL cannot be reached: {error}") from None
    if faults:
        raise StartFailed(f"BROKER_URL: {' '.join(map(str, faults))}")


def _broker_faults(url: str) -> list[Fault]:
    """Return what the user of a broker may not do; an empty list for a broker that is not Redis."""
    if not is_redis(url):
        return []
    with connect(url, timeout_s=5, retries=0) as client:
        return find_broker_faults(client)
