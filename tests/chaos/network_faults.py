"""The network between a worker and Redis, which can be cut so that neither side is told.

Where this machine allows it (Linux, root), a worker lives in a network namespace of its own, whose link is taken down.
Elsewhere it goes through a proxy that stops forwarding. Both lose nothing that TCP does not: once mended, what was on
its way still arrives, late.
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
"""How long a proxied connection may take to notice that it is cut, mended or closed."""


class Link(Protocol):
    """A way from one worker to Redis."""

    address: tuple[str, int]
    """Where the worker finds Redis."""
    kind: str

    def command(self, command: Sequence[str]) -> list[str]:
        """What to run so that `command` uses this link."""
        ...

    def cut(self) -> None:
        """Let nothing through any more, silently."""
        ...

    def mend(self) -> None:
        """Let everything through again."""
        ...

    def close(self) -> None:
        """Take it away."""
        ...


class Namespace:
    """A pair of virtual interfaces, one of them in a network namespace of its own."""

    kind = "network namespace"

    def __init__(self, number: int, port: int) -> None:
        """Lay it. Redis must listen on `address` itself, whose host is this machine's end of the link."""
        tag = f"mq{os.getpid()}{number}"
        self._name, self._here, there = tag, f"{tag}h", f"{tag}n"
        taken = {address.address for each in psutil.net_if_addrs().values() for address in each}
        host, guest = _free_pair(os.getpid() * 8 + number, taken)
        self.address = (host, port)
        try:
            _ip("netns", "add", self._name)
            _ip("link", "add", self._here, "type", "veth", "peer", "name", there, "netns", self._name)
            _ip("addr", "add", f"{host}/30", "dev", self._here)
            _ip("link", "set", self._here, "up")
            _ip("-n", self._name, "addr", "add", f"{guest}/30", "dev", there)
            _ip("-n", self._name, "link", "set", there, "up")
            _ip("-n", self._name, "link", "set", "lo", "up")
        except BaseException:
            self.close()
            raise

    def command(self, command: Sequence[str]) -> list[str]:
        """Run it in the namespace."""
        return ["ip", "netns", "exec", self._name, *command]

    def cut(self) -> None:
        """Take this machine's end down: the other end goes on sending, into nothing."""
        _ip("link", "set", self._here, "down")

    def mend(self) -> None:
        """Take it up again."""
        _ip("link", "set", self._here, "up")

    def close(self) -> None:
        """Remove the namespace, and with it the interfaces."""
        _remove(self._name)


_BLOCKS = 2**15
"""Networks of four addresses in the block for tests between networks (RFC 2544)."""


def _free_pair(first: int, taken: Container[str]) -> tuple[str, str]:
    """The two ends' addresses: another pair for each number, and one whose near end nobody here has."""
    for number in range(first, first + 8 * _BLOCKS, 8):
        block = number % _BLOCKS * 4
        network = f"198.{18 + block // 65_536}.{block // 256 % 256}"
        host, guest = f"{network}.{block % 256 + 1}", f"{network}.{block % 256 + 2}"
        if host not in taken:
            return host, guest
    raise OSError("every network for tests is taken")


def orphans(names: Iterable[str]) -> list[str]:
    """Of these namespaces, those of runs that live no more."""
    found = ((name, re.fullmatch(r"mq(\d+)\d", name)) for name in names)
    return [name for name, match in found if match and not psutil.pid_exists(int(match[1]))]


def sweep() -> None:
    """Remove what dead runs have left."""
    folder = Path("/run/netns")
    for name in orphans(each.name for each in folder.iterdir()) if folder.is_dir() else ():
        _remove(name)


def _remove(name: str) -> None:
    """A namespace and its link."""
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
    """A TCP proxy that stops forwarding when it is cut, and closes nothing."""

    kind = "proxy"

    def __init__(self, target: tuple[str, int]) -> None:
        self._target = target
        self._flowing = threading.Event()
        self._flowing.set()
        self._closed = False
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.address = ("127.0.0.1", int(self._listener.getsockname()[1]))
        threading.Thread(target=self._accept, name="proxy", daemon=True).start()

    def command(self, command: Sequence[str]) -> list[str]:
        """Run it as it is."""
        return list(command)

    def cut(self) -> None:
        """Read nothing and write nothing; new connections are made and get no answer."""
        self._flowing.clear()

    def mend(self) -> None:
        """Go on."""
        self._flowing.set()

    def close(self) -> None:
        """Close every connection."""
        self._closed = True
        self._flowing.set()
        self._listener.close()

    def _accept(self) -> None:
        while not self._closed:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(near,), daemon=True).start()

    def _serve(self, near: socket.socket) -> None:
        self._flowing.wait()
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
                self._flowing.wait()
                try:
                    data = source.recv(_CHUNK)
                except TimeoutError:
                    continue
                self._flowing.wait()
                if not data:
                    break
                sink.sendall(data)
        except OSError:
            pass
        for end in (source, sink):
            end.close()


def namespaces_work() -> bool:
    """Whether this machine lets us lay links into namespaces."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    try:
        Namespace(9, 1).close()
    except OSError:
        return False
    return True
