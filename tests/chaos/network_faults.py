"""The network between a worker and Redis. It can be cut without notice to either side.

On Linux as root, each worker runs in its own network namespace, whose link is taken down. Elsewhere, it connects
through a proxy that stops forwarding. TCP hides the loss: after the link is restored, delayed data arrives.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import threading
from collections.abc import Container, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import psutil

_CHUNK = 64 * 2**10
_CHECK_S = 0.05
"""Interval at which a proxied connection checks whether it is cut, restored or closed."""


class Link(Protocol):
    """A network link from one worker to Redis."""

    address: tuple[str, int]
    """Address under which the worker reaches Redis."""
    kind: str

    def command(self, command: Sequence[str]) -> list[str]:
        """Return a command line that runs `command` with this link."""
        ...

    def cut(self) -> None:
        """Drop everything from now on, without closing connections."""
        ...

    def restore(self) -> None:
        """Deliver everything again."""
        ...

    def close(self) -> None:
        """Remove the link."""
        ...


class Namespace:
    """A pair of virtual interfaces, one of them in its own network namespace.

    Attributes:
        guest: the address of the end in the namespace.
    """

    kind = "network namespace"

    def __init__(self, number: int, port: int) -> None:
        """Create the link. Redis must listen on `address`, whose host is this machine's end of the link."""
        tag = f"mq{os.getpid()}{number}"
        self._name, self._here, there = tag, f"{tag}h", f"{tag}n"
        in_use = {address.address for each in psutil.net_if_addrs().values() for address in each}
        host, self.guest = _free_pair(os.getpid() * 8 + number, in_use)
        self.address = (host, port)
        try:
            _ip("netns", "add", self._name)
            _ip("link", "add", self._here, "type", "veth", "peer", "name", there, "netns", self._name)
            _ip("addr", "add", f"{host}/30", "dev", self._here)
            _ip("link", "set", self._here, "up")
            _ip("-n", self._name, "addr", "add", f"{self.guest}/30", "dev", there)
            _ip("-n", self._name, "link", "set", there, "up")
            _ip("-n", self._name, "link", "set", "lo", "up")
        except BaseException:
            self.close()
            raise

    def command(self, command: Sequence[str]) -> list[str]:
        """Run the command in the namespace."""
        return ["ip", "netns", "exec", self._name, *command]

    def cut(self) -> None:
        """Take this machine's end down. The other end does not notice and keeps sending."""
        _ip("link", "set", self._here, "down")

    def restore(self) -> None:
        """Take this machine's end up again."""
        _ip("link", "set", self._here, "up")

    def close(self) -> None:
        """Remove the namespace, and with it the interfaces."""
        _remove(self._name)


_BLOCKS = 2**15
"""Number of networks with four addresses in the block for benchmarks (RFC 2544)."""


def _free_pair(first: int, in_use: Container[str]) -> tuple[str, str]:
    """Return addresses for both ends: a different pair for each number, whose first address is unused here."""
    for number in range(first, first + 8 * _BLOCKS, 8):
        block = number % _BLOCKS * 4
        network = f"198.{18 + block // 65_536}.{block // 256 % 256}"
        host, guest = f"{network}.{block % 256 + 1}", f"{network}.{block % 256 + 2}"
        if host not in in_use:
            return host, guest
    raise OSError("all networks for benchmarks are in use")


def find_orphans(names: Iterable[str]) -> list[str]:
    """Return the namespaces of runs whose process has ended."""
    matches = ((name, re.fullmatch(r"mq(\d+)\d", name)) for name in names)
    return [name for name, match in matches if match and not psutil.pid_exists(int(match[1]))]


def clean_up() -> None:
    """Remove the namespaces of killed runs."""
    folder = Path("/run/netns")
    for name in find_orphans(each.name for each in folder.iterdir()) if folder.is_dir() else ():
        _remove(name)


def _remove(name: str) -> None:
    """Remove a namespace and its link."""
    with suppress(OSError):
        _ip("link", "del", f"{name}h")
    with suppress(OSError):
        _ip("netns", "del", name)


def _ip(*arguments: str) -> None:
    try:
        subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        raise OSError(f"ip {' '.join(arguments)}: {error.stderr.strip()}") from error


class Proxy:
    """A TCP proxy that stops forwarding while it is cut, without closing connections."""

    kind = "proxy"

    def __init__(self, target: tuple[str, int]) -> None:
        self._target = target
        self._forwarding = threading.Event()
        self._forwarding.set()
        self._closed = False
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.address = ("127.0.0.1", int(self._listener.getsockname()[1]))
        threading.Thread(target=self._accept, name="proxy", daemon=True).start()

    def command(self, command: Sequence[str]) -> list[str]:
        """Return the command unchanged."""
        return list(command)

    def cut(self) -> None:
        """Stop forwarding. New connections are accepted but not served."""
        self._forwarding.clear()

    def restore(self) -> None:
        """Forward again."""
        self._forwarding.set()

    def close(self) -> None:
        """Close every connection."""
        self._closed = True
        self._forwarding.set()
        self._listener.close()

    def _accept(self) -> None:
        while not self._closed:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(near,), daemon=True).start()

    def _serve(self, near: socket.socket) -> None:
        self._forwarding.wait()
        try:
            far = socket.create_connection(self._target)
        except OSError:
            near.close()
            return
        for source, sink in ((near, far), (far, near)):
            source.settimeout(_CHECK_S)
            threading.Thread(target=self._forward, args=(source, sink), daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while not self._closed:
                self._forwarding.wait()
                try:
                    data = source.recv(_CHUNK)
                except TimeoutError:
                    continue
                self._forwarding.wait()
                if not data:
                    break
                sink.sendall(data)
        except OSError:
            pass
        for end in (source, sink):
            end.close()


def namespaces_work() -> bool:
    """Whether this machine allows creating network namespaces."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    try:
        Namespace(9, 1).close()
    except OSError:
        return False
    return True
