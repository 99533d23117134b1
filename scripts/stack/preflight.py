"""What can be known to go wrong before anything is started, each as one line."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import sys
import tempfile
from pathlib import Path

import redis
from pydantic import ValidationError

from scripts.stack.failure import StartFailed
from shared.queue.durability import why_unproven
from shared.queue.redis import connect
from shared.queue.redis_url import is_redis
from shared.queue.requirements import Fault, find_broker_faults, find_faults
from shared.settings import ENV_FILE, ROOT, Settings, faults, load_settings

MIN_FREE_BYTES = 200 * 2**20
_SOCKET_PATH_MAX = 103 if sys.platform == "darwin" else 107
# Supervisor binds its socket under a temporary name: the path, a dot and its process id.
_SOCKET_SUFFIX = len(".4194304")
# Supervisor's configuration gives them a meaning and cannot quote them everywhere; `?` ends the path of a Redis URL.
_BAD_PATH_CHARACTERS = set("%;#\"'\\\n?")


def settings_or_fail() -> Settings:
    """The settings; one line for each variable that does not fit. The first run creates ENV_FILE."""
    try:
        return load_settings(env_file_may_be_missing=True)
    except ValidationError as error:
        raise StartFailed(faults(error)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise StartFailed(f"cannot read {ENV_FILE}: {error}") from None


def prepare_data_dir(settings: Settings) -> None:
    """Make the folders, and see that they can be written and hold a socket."""
    folder = settings.data_dir
    for name, path in (("DATA_DIR", folder), ("this checkout's folder", ROOT)):
        if bad := sorted(_BAD_PATH_CHARACTERS & set(str(path))):
            raise StartFailed(f"{name} {str(path)!r} has characters that it may not have: {' '.join(map(repr, bad))}")
    excess = len(os.fsencode(settings.redis_socket)) + _SOCKET_SUFFIX - _SOCKET_PATH_MAX
    if excess > 0:
        raise StartFailed(f"DATA_DIR {folder} is {excess} bytes too long: its sockets' paths have a limit")
    try:
        for each in (folder, settings.run_dir, settings.log_dir, folder / "valkey"):
            each.mkdir(mode=0o700, parents=True, exist_ok=True)
        _write_probe(folder)
    except OSError as error:
        raise StartFailed(f"cannot write to DATA_DIR {folder}: {os.strerror(error.errno or 0)}") from None
    if full := full_disk(folder, MIN_FREE_BYTES):
        raise StartFailed(full)


def full_disk(folder: Path, needed: int) -> str:
    """The line that says so when the disk has fewer bytes free than needed; empty when it has them."""
    free = shutil.disk_usage(folder).free
    return f"the disk of DATA_DIR {folder} is full: {free >> 20} MB free, needs {needed >> 20}" * (free < needed)


def _write_probe(folder: Path) -> None:
    # A quota or a full file system shows only when blocks are really taken.
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"\0" * 65536)
        file.flush()
        os.fsync(file.fileno())


def check_ports(settings: Settings) -> None:
    """See that both ports are free."""
    if settings.port == settings.flower_port:
        raise StartFailed(f"PORT and FLOWER_PORT are both {settings.port}")
    for name, port in (("PORT", settings.port), ("FLOWER_PORT", settings.flower_port)):
        _check_port(settings.host, name, port)


def _check_port(host: str, name: str, port: int) -> None:
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror:
        raise StartFailed(f"HOST {host} is not an address of this machine") from None
    with socket.socket(family, kind) as probe:
        # As the servers do: connections of an earlier run that still time out do not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise StartFailed(f"port {port} is taken; set {name} to another in {ENV_FILE}") from None
            raise StartFailed(f"cannot listen on {host} port {port}: {os.strerror(error.errno or 0)}") from None


def check_redis(settings: Settings) -> None:
    """Check that an external Redis responds, fulfils the requirements, and writes jobs to disk."""
    if settings.embedded_redis:
        return
    try:
        with connect(settings.store_url, timeout_s=5, retries=0) as client:
            client.ping()
            faults = find_faults(client, broker=not settings.broker_url)
            unproven = why_unproven(client) if settings.durable and not faults else ""
    except (redis.RedisError, ValueError, OSError) as error:
        raise StartFailed(f"REDIS_URL cannot be reached: {error}") from None
    if faults:
        raise StartFailed(f"REDIS_URL: {' '.join(map(str, faults))}")
    if unproven:
        raise StartFailed(f"REDIS_URL: {unproven} To accept them all the same: DURABLE=false")


def check_broker(settings: Settings) -> None:
    """See that a broker of its own answers."""
    if not settings.broker_url:
        return
    from shared.queue.wakeups import make_app

    try:
        with make_app(settings, hasty=True).connection_for_write() as connection:
            connection.connect()
        faults = _broker_faults(settings.broker_url)
    except Exception as error:  # noqa: BLE001 - each of kombu's transports has errors of its own
        raise StartFailed(f"BROKER_URL cannot be reached: {error}") from None
    if faults:
        raise StartFailed(f"BROKER_URL: {' '.join(map(str, faults))}")


def _broker_faults(url: str) -> list[Fault]:
    """Return what the user of a broker may not do; an empty list for a broker that is not Redis."""
    if not is_redis(url):
        return []
    with connect(url, timeout_s=5, retries=0) as client:
        return find_broker_faults(client)
