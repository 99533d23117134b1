"""Images at http(s) URLs, read without letting a request reach what only this machine can reach.

A name is resolved here, every address it has must be a public one, and the connection goes to the very address that was
looked at: a name that resolves to another address a moment later leads nowhere. A redirect is a new URL.
"""

from __future__ import annotations

import http.client
import ipaddress
import logging
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from typing import Final
from urllib.parse import SplitResult, urljoin, urlsplit

from shared.errors import Invalid, TooLarge

log = logging.getLogger(__name__)

SECONDS: Final = 10.0
"""For an image in all, whatever it is that takes long."""
REDIRECTS: Final = 3
_PORTS: Final = {"http": 80, "https": 443}
_MOVED: Final = (301, 302, 303, 307, 308)
_PIECE: Final = 64 * 2**10

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolve = Callable[[str, int], Sequence[str]]


def is_public(text: str) -> bool:
    """Whether an address is one of the internet's, also where it is an IPv4 address in IPv6's clothes."""
    try:
        address: Address = ipaddress.ip_address(text.split("%", 1)[0])
    except ValueError:
        return False
    inner = _inside(address)
    public = address.is_global and not address.is_multicast and not address.is_reserved
    return public if inner is None else inner.is_global and not inner.is_multicast


def _inside(address: Address) -> ipaddress.IPv4Address | None:
    """The IPv4 address that an IPv6 address stands for: mapped, 6to4, Teredo or NAT64."""
    if isinstance(address, ipaddress.IPv4Address):
        return None
    if address.ipv4_mapped or address.sixtofour:
        return address.ipv4_mapped or address.sixtofour
    if address.teredo:
        return address.teredo[1]
    nat64 = int(address) >> 32 == int(ipaddress.IPv6Address("64:ff9b::")) >> 32
    return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF) if nat64 else None


def resolved(host: str, port: int) -> list[str]:
    """All addresses of a name."""
    return [str(found[4][0]) for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


class ImageUrls:
    """Reads images.

    Args:
        resolve: gives the addresses of a name; for tests.
        public: whether an address may be connected to.
        ports: the only port of each scheme; None: any.
    """

    def __init__(
        self,
        resolve: Resolve = resolved,
        public: Callable[[str], bool] = is_public,
        ports: dict[str, int] | None = _PORTS,
    ) -> None:
        self._resolve = resolve
        self._public = public
        self._ports = ports

    def fetch(self, url: str, most_bytes: int) -> bytes:
        """What is there.

        Raises:
            Invalid: it may not be read (`image_url_refused`), or cannot be (`image_unreachable`).
            TooLarge: it has more bytes.
        """
        until = time.monotonic() + SECONDS
        try:
            for _ in range(1 + REDIRECTS):
                found = self._ask(url, most_bytes, until)
                if isinstance(found, bytes):
                    return found
                url = urljoin(url, found)
        except (OSError, http.client.HTTPException, ValueError) as error:
            log.info("An image could not be read: %s", type(error).__name__)
            raise Invalid("The image cannot be read from there.", code="image_unreachable") from error
        raise Invalid(f"The image's URL redirects more than {REDIRECTS} times.", code="image_unreachable")

    def _ask(self, url: str, most_bytes: int, until: float) -> bytes | str:
        """The image, or where it is instead."""
        parts = urlsplit(url)
        connection = self._connected(parts, until)
        sock = connection.sock
        try:
            target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            connection.request("GET", target, headers={"Accept": "image/*", "Accept-Encoding": "identity"})
            with connection.getresponse() as answer:
                if answer.status in _MOVED and (location := answer.getheader("Location")):
                    return location
                if answer.status != http.client.OK:
                    raise Invalid(f"There is no image: the answer was {answer.status}.", code="image_unreachable")
                return _read(answer, sock, most_bytes, until)
        finally:
            connection.close()

    def _connected(self, parts: SplitResult, until: float) -> http.client.HTTPConnection:
        host, scheme = parts.hostname, parts.scheme.lower()
        if scheme not in _PORTS or not host or parts.username is not None or parts.password is not None:
            raise Invalid("The URL is none that images are read from.", code="image_url_refused")
        port = parts.port or _PORTS[scheme]
        if self._ports is not None and port != self._ports[scheme]:
            raise Invalid(f"Images are read from port {self._ports[scheme]} alone.", code="image_url_refused")
        addresses = self._resolve(host, port)
        if not addresses or not all(map(self._public, addresses)):
            raise Invalid("The URL leads to no public address.", code="image_url_refused")
        raw = socket.create_connection((addresses[0], port), timeout=_left(until))
        connection = http.client.HTTPConnection(host, port)
        connection.sock = raw
        if scheme == "https":
            try:
                connection.sock = ssl.create_default_context().wrap_socket(raw, server_hostname=host)
            except OSError:
                raw.close()
                raise
        return connection


def _read(answer: http.client.HTTPResponse, sock: socket.socket, most_bytes: int, until: float) -> bytes:
    """The body, as far as it is allowed to go and in the time that is left."""
    if answer.getheader("Content-Encoding", "identity") != "identity":
        raise Invalid("The image comes packed in another way than was asked for.", code="image_unreachable")
    pieces: list[bytes] = []
    size = 0
    while True:
        sock.settimeout(_left(until))
        piece = answer.read1(_PIECE)
        if not piece:
            return b"".join(pieces)
        size += len(piece)
        if size > most_bytes:
            raise TooLarge(f"The image has more than {most_bytes:,} bytes.", code="image_too_large")
        pieces.append(piece)


def _left(until: float) -> float:
    left = until - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left
