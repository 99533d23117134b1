"""Connections to servers that clients name, without allowing them to reach internal addresses (SSRF).

A host name is resolved here once. All of its addresses must be allowed, and the connection goes to one of these very
addresses, so a name that resolves differently a moment later has no effect (DNS rebinding).
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from typing import Final
from urllib.parse import quote, urlsplit

from gevent.monkey import get_original
from gevent.threadpool import ThreadPool

from web.http.threadpool import run_with_timeout

CONNECT_TIMEOUT_S: Final = 4.0
"""For one address. Another address of the name may still accept."""
_LOOKUP_THREADS: Final = 4
"""Concurrent name lookups per caller. Lookups cannot be interrupted, so each caller has a pool of its own: names that
do not resolve delay only the one that sent them."""
_IDLE_THREAD_S: Final = 60
"""Seconds after which an unused lookup thread ends."""
DEFAULT_PORTS: Final[Mapping[str, int]] = {"http": 80, "https": 443}
_UNQUOTED: Final = "/%?&=:@!$'()*+,;~-._[]|"
"""Characters of a path or query that stay as they are. Others are percent-encoded, as browsers do."""

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolve = Callable[[str, int], Sequence[str]]

_RESERVED_NETWORKS: Final = tuple(
    map(
        ipaddress.ip_network,
        ("192.0.0.0/24", "192.88.99.0/24", "fec0::/10", "64:ff9b:1::/48", "3fff::/20", "5f00::/16"),
    )
)
"""Further networks that are not public; some versions of Python's `ipaddress` count them as global."""


def is_public_address(text: str) -> bool:
    """Whether an IP address is public. An IPv6 address that embeds an IPv4 address is judged by the latter."""
    try:
        address: Address = ipaddress.ip_address(text.split("%", 1)[0])
    except ValueError:
        return False
    address = _embedded_ipv4(address) or address
    reserved = address.is_multicast or address.is_reserved or any(address in network for network in _RESERVED_NETWORKS)
    return address.is_global and not reserved


def _embedded_ipv4(address: Address) -> ipaddress.IPv4Address | None:
    """Return the IPv4 address in an IPv4-mapped, 6to4, Teredo or NAT64 address."""
    if isinstance(address, ipaddress.IPv4Address):
        return None
    if address.ipv4_mapped or address.sixtofour:
        return address.ipv4_mapped or address.sixtofour
    if address.teredo:
        return address.teredo[1]
    nat64 = int(address) >> 32 == int(ipaddress.IPv6Address("64:ff9b::")) >> 32
    return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF) if nat64 else None


def resolve_host(host: str, port: int) -> list[str]:
    """Return all addresses of a host name. Blocks, so it must run in a thread outside the event loop."""
    entries = get_original("socket", "getaddrinfo")(host, port, type=socket.SOCK_STREAM)
    return [str(entry[4][0]) for entry in entries]


class UrlRefused(Exception):
    """A URL that must not be requested. The text says why, for the client."""


@dataclass(frozen=True, slots=True)
class Target:
    """The parts of a URL that a request needs."""

    host: str
    port: int
    path: str
    secure: bool

    @property
    def authority(self) -> str:
        """Host and port."""
        return f"{self.host}:{self.port}"


def parse_url(url: str, ports: Mapping[str, int] | None = None) -> Target:
    """Parse a URL.

    Args:
        ports: the only port allowed for each scheme; None allows any.

    Raises:
        UrlRefused: the URL is malformed, has credentials, or another scheme or port.
    """
    try:
        parts = urlsplit(url)
        host, port, scheme = parts.hostname, parts.port, parts.scheme.lower()
    except ValueError:
        raise UrlRefused("The URL is malformed.") from None
    if scheme not in DEFAULT_PORTS or not host or parts.username is not None or parts.password is not None:
        raise UrlRefused("The URL must be http:// or https:// with a host name and without credentials.")
    port = DEFAULT_PORTS[scheme] if port is None else port
    if ports is not None and port != ports[scheme]:
        raise UrlRefused(f"The URL must use port {ports[scheme]}, the default of {scheme}.")
    path = quote((parts.path or "/") + (f"?{parts.query}" if parts.query else ""), safe=_UNQUOTED)
    return Target(host, port, path, secure=scheme == "https")


class Outbound:
    """Makes connections.

    Args:
        resolve: returns the addresses of a host name.
        is_allowed: whether an address may be connected to.
    """

    def __init__(self, resolve: Resolve = resolve_host, is_allowed: Callable[[str], bool] = is_public_address) -> None:
        self._resolve = resolve
        self._is_allowed = is_allowed
        self._lookup_threads: dict[str, ThreadPool] = {}

    def addresses(self, target: Target, deadline: float, caller: str) -> Sequence[str]:
        """Return the addresses of a server.

        Args:
            deadline: when to give up, by `time.monotonic`.
            caller: on whose behalf the name is looked up.

        Raises:
            UrlRefused: one of them is not allowed.
            OSError: the name cannot be resolved.
        """
        threads = self._lookup_threads.get(caller)
        if threads is None:
            threads = self._lookup_threads[caller] = ThreadPool(_LOOKUP_THREADS, idle_task_timeout=_IDLE_THREAD_S)
        addresses = run_with_timeout(remaining_s(deadline), threads, lambda: self._resolve(target.host, target.port))
        if not addresses or not all(map(self._is_allowed, addresses)):
            raise UrlRefused("The host of the URL must have only public addresses.")
        return addresses

    @contextmanager
    def connection(self, target: Target, deadline: float, caller: str) -> Iterator[http.client.HTTPConnection]:
        """Connect to a server; shut the connection down at the deadline.

        Raises:
            UrlRefused: an address of the server is not allowed.
            OSError: the connection fails.
        """
        sock = self._connect(target, deadline, caller)
        with closing(sock), _shutdown_at(deadline, sock):
            if isinstance(sock, ssl.SSLSocket):
                sock.do_handshake()
            connection = http.client.HTTPConnection(target.host, target.port)
            connection.sock = sock
            yield connection

    def _connect(self, target: Target, deadline: float, caller: str) -> socket.socket:
        raw = _connect_any(self.addresses(target, deadline, caller), target.port, deadline)
        if not target.secure:
            return raw
        try:
            context = ssl.create_default_context()
            return context.wrap_socket(raw, server_hostname=target.host, do_handshake_on_connect=False)
        except BaseException:
            raw.close()
            raise


def _connect_any(addresses: Sequence[str], port: int, deadline: float) -> socket.socket:
    """Connect to the first address that accepts."""
    error = OSError("no address")
    for address in dict.fromkeys(addresses):
        try:
            timeout_s = min(remaining_s(deadline), CONNECT_TIMEOUT_S)
            sock = socket.create_connection((address, port), timeout=timeout_s)
        except OSError as failed:
            error = failed
        else:
            sock.settimeout(None)  # `_shutdown_at` enforces the deadline
            return sock
    raise error


@contextmanager
def _shutdown_at(deadline: float, sock: socket.socket) -> Iterator[None]:
    """Shut a connection down at the deadline. A socket timeout is not enough: every byte received restarts it."""

    def shutdown() -> None:
        with suppress(OSError):  # already closed
            # Not SSLSocket.shutdown: it drops the TLS state, and the reader would continue in plain text.
            socket.socket.shutdown(sock, socket.SHUT_RDWR)

    timer = threading.Timer(remaining_s(deadline), shutdown)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def remaining_s(deadline: float) -> float:
    """Return the seconds until a deadline. Raises TimeoutError if it has passed."""
    remaining_s = deadline - time.monotonic()
    if remaining_s <= 0:
        raise TimeoutError
    return remaining_s
