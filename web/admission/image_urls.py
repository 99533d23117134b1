"""Fetch images from http(s) URLs without allowing requests to reach internal addresses (SSRF).

A host name is resolved here once. All of its addresses must be public, and the connection goes to one of these very
addresses, so a name that resolves differently a moment later has no effect (DNS rebinding). Every redirect is checked
like a new URL.
"""

from __future__ import annotations

import http.client
import ipaddress
import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from typing import Final, Self
from urllib.parse import quote, urljoin, urlsplit

from gevent.monkey import get_original
from gevent.threadpool import ThreadPool

from shared.errors import Invalid, TooLarge
from web.http.threadpool import run_with_timeout

log = logging.getLogger(__name__)

TIMEOUT_S: Final = 10.0
"""For an image as a whole: name resolution, connections, redirects and transfer."""
MAX_REDIRECTS: Final = 3
_CONNECT_TIMEOUT_S: Final = 4.0
"""For one address. Another address of the name may still accept."""
_LOOKUP_THREADS: Final = 4
"""Concurrent name lookups per API key. Lookups cannot be interrupted, so each key has a pool of its own: names that do
not resolve delay only the key that sent them."""
_IDLE_THREAD_S: Final = 60
"""Seconds after which an unused lookup thread ends."""
_PORTS: Final = {"http": 80, "https": 443}
_REDIRECT_STATUSES: Final = (301, 302, 303, 307, 308)
_CHUNK_BYTES: Final = 64 * 2**10
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


@dataclass(frozen=True, slots=True)
class _Target:
    """The parts of a URL that a request needs."""

    host: str
    port: int
    path: str
    secure: bool

    @classmethod
    def of(cls, url: str, ports: dict[str, int] | None) -> Self:
        """Parse a URL.

        Args:
            ports: the only port allowed for each scheme; None allows any.

        Raises:
            Invalid: the URL is malformed, has credentials, or another scheme or port.
        """
        try:
            parts = urlsplit(url)
            host, port, scheme = parts.hostname, parts.port, parts.scheme.lower()
        except ValueError:
            raise _refused("The URL is malformed.") from None
        if scheme not in _PORTS or not host or parts.username is not None or parts.password is not None:
            raise _refused("The URL must be http:// or https:// with a host name and without credentials.")
        port = _PORTS[scheme] if port is None else port
        if ports is not None and port != ports[scheme]:
            raise _refused(f"The URL must use port {ports[scheme]}, the default of {scheme}.")
        path = quote((parts.path or "/") + (f"?{parts.query}" if parts.query else ""), safe=_UNQUOTED)
        return cls(host, port, path, secure=scheme == "https")


class ImageUrls:
    """Fetches images.

    Args:
        resolve: returns the addresses of a host name.
        is_allowed: whether an address may be connected to.
        ports: the only port allowed for each scheme; None allows any.
    """

    def __init__(
        self,
        resolve: Resolve = resolve_host,
        is_allowed: Callable[[str], bool] = is_public_address,
        ports: dict[str, int] | None = _PORTS,
    ) -> None:
        self._resolve = resolve
        self._is_allowed = is_allowed
        self._ports = ports
        self._lookup_threads: dict[str, ThreadPool] = {}

    def fetch(self, url: str, max_bytes: int, caller: str = "") -> bytes:
        """Return the content of a URL.

        Args:
            caller: id of the API key on whose behalf the URL is read.

        Raises:
            Invalid: the URL is not allowed (`image_url_refused`) or cannot be read (`image_unreachable`).
            TooLarge: the content has more than `max_bytes`.
        """
        deadline = time.monotonic() + TIMEOUT_S
        try:
            for _ in range(1 + MAX_REDIRECTS):
                content = self._get(_Target.of(url, self._ports), max_bytes, deadline, caller)
                if isinstance(content, bytes):
                    return content
                url = urljoin(url, content)
        except (OSError, http.client.HTTPException, ValueError) as error:
            log.info("image_fetch_failed", extra={"reason": type(error).__name__})
            raise Invalid("The URL of the image cannot be read.", code="image_unreachable") from error
        raise Invalid(f"The URL of the image redirects more than {MAX_REDIRECTS} times.", code="image_unreachable")

    def _get(self, target: _Target, max_bytes: int, deadline: float, caller: str) -> bytes | str:
        """Return the content, or the location of a redirect."""
        sock = self._connect(target, deadline, caller)
        with closing(sock), _shutdown_at(deadline, sock):
            if isinstance(sock, ssl.SSLSocket):
                sock.do_handshake()
            connection = http.client.HTTPConnection(target.host, target.port)
            connection.sock = sock
            connection.request("GET", target.path, headers={"Accept": "image/*", "Accept-Encoding": "identity"})
            with connection.getresponse() as response:
                if response.status in _REDIRECT_STATUSES and (location := response.getheader("Location")):
                    return location
                if response.status != http.client.OK:
                    detail = f"The URL of the image returned status {response.status}."
                    raise Invalid(detail, code="image_unreachable")
                return _read(response, max_bytes, deadline)

    def _connect(self, target: _Target, deadline: float, caller: str) -> socket.socket:
        raw = _connect_any(self._addresses(target, deadline, caller), target.port, deadline)
        if not target.secure:
            return raw
        try:
            context = ssl.create_default_context()
            return context.wrap_socket(raw, server_hostname=target.host, do_handshake_on_connect=False)
        except BaseException:
            raw.close()
            raise

    def _addresses(self, target: _Target, deadline: float, caller: str) -> Sequence[str]:
        threads = self._lookup_threads.get(caller)
        if threads is None:
            threads = self._lookup_threads[caller] = ThreadPool(_LOOKUP_THREADS, idle_task_timeout=_IDLE_THREAD_S)
        addresses = run_with_timeout(_remaining_s(deadline), threads, lambda: self._resolve(target.host, target.port))
        if not addresses or not all(map(self._is_allowed, addresses)):
            raise _refused("The host of the URL must have only public addresses.")
        return addresses


def _refused(detail: str) -> Invalid:
    return Invalid(detail, code="image_url_refused")


def _connect_any(addresses: Sequence[str], port: int, deadline: float) -> socket.socket:
    """Connect to the first address that accepts."""
    error = OSError("no address")
    for address in dict.fromkeys(addresses):
        try:
            timeout_s = min(_remaining_s(deadline), _CONNECT_TIMEOUT_S)
            sock = socket.create_connection((address, port), timeout=timeout_s)
        except OSError as failed:
            error = failed
        else:
            sock.settimeout(TIMEOUT_S)  # longer than what is left: `_shutdown_at` enforces the deadline
            return sock
    raise error


@contextmanager
def _shutdown_at(deadline: float, sock: socket.socket) -> Iterator[None]:
    """Shut a connection down at the deadline. A socket timeout is not enough: every byte received restarts it."""

    def shutdown() -> None:
        with suppress(OSError):  # already closed
            # Not SSLSocket.shutdown: it drops the TLS state, and the reader would continue in plain text.
            socket.socket.shutdown(sock, socket.SHUT_RDWR)

    timer = threading.Timer(_remaining_s(deadline), shutdown)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _read(response: http.client.HTTPResponse, max_bytes: int, deadline: float) -> bytes:
    """Read a response body, within the limits of size and time."""
    if response.getheader("Content-Encoding", "identity") != "identity":
        detail = "The server of the image returned an unsupported Content-Encoding."
        raise Invalid(detail, code="image_unreachable")
    chunks: list[bytes] = []
    size = 0
    while chunk := response.read1(_CHUNK_BYTES):
        size += len(chunk)
        if size > max_bytes:
            raise TooLarge(f"The image has more than {max_bytes:,} bytes.", code="image_too_large")
        chunks.append(chunk)
    _remaining_s(deadline)  # raises if the body ended because `_shutdown_at` cut it off
    return b"".join(chunks)


def _remaining_s(deadline: float) -> float:
    remaining_s = deadline - time.monotonic()
    if remaining_s <= 0:
        raise TimeoutError
    return remaining_s
