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

SECONDS: Final = 10.0
"""For an image in all, whatever it is that takes long."""
REDIRECTS: Final = 3
_CONNECT_S: Final = 4.0
"""For one address; a name may have another that answers."""
_LOOKUPS: Final = 4
"""Names that are looked up at once for a caller, in threads of its own: who asks for those that nobody answers, which
takes long whoever waits for it, waits alone."""
_IDLE_S: Final = 60
"""A thread that has had nothing to look up for so long ends."""
_PORTS: Final = {"http": 80, "https": 443}
_MOVED: Final = (301, 302, 303, 307, 308)
_PIECE: Final = 64 * 2**10
_MAY_STAND: Final = "/%?&=:@!$'()*+,;~-._[]|"
"""Characters of a path or query that stay as they are; those that URLs do not have are escaped, as browsers do it."""

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolve = Callable[[str, int], Sequence[str]]

_SPECIAL: Final = tuple(
    map(
        ipaddress.ip_network,
        ("192.0.0.0/24", "192.88.99.0/24", "fec0::/10", "64:ff9b:1::/48", "3fff::/20", "5f00::/16"),
    )
)
"""Not the internet's either: some Pythons do not know it of all of them."""


def is_public(text: str) -> bool:
    """Whether an address is one of the internet's, also where it is an IPv4 address in IPv6's clothes."""
    try:
        address: Address = ipaddress.ip_address(text.split("%", 1)[0])
    except ValueError:
        return False
    address = _inside(address) or address
    private = address.is_multicast or address.is_reserved or any(address in network for network in _SPECIAL)
    return address.is_global and not private


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
    """All addresses of a name. For a thread outside the event loop."""
    found = get_original("socket", "getaddrinfo")(host, port, type=socket.SOCK_STREAM)
    return [str(each[4][0]) for each in found]


@dataclass(frozen=True, slots=True)
class _Place:
    """What a URL says of where an image is."""

    host: str
    port: int
    target: str
    secure: bool

    @classmethod
    def of(cls, url: str, ports: dict[str, int] | None) -> Self:
        """Raises `Invalid` unless it is a plain URL with one of these ports."""
        try:
            parts = urlsplit(url)
            host, port, scheme = parts.hostname, parts.port, parts.scheme.lower()
        except ValueError:
            raise _refused("It is no URL.") from None
        if scheme not in _PORTS or not host or parts.username is not None or parts.password is not None:
            raise _refused("The URL is none that images are read from.")
        port = _PORTS[scheme] if port is None else port
        if ports is not None and port != ports[scheme]:
            raise _refused(f"Images are read from port {ports[scheme]} alone.")
        target = quote((parts.path or "/") + (f"?{parts.query}" if parts.query else ""), safe=_MAY_STAND)
        return cls(host, port, target, secure=scheme == "https")


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
        self._lookups: dict[str, ThreadPool] = {}

    def fetch(self, url: str, most_bytes: int, caller: str = "") -> bytes:
        """What is there.

        Args:
            caller: on whose behalf; there are as many as API keys.

        Raises:
            Invalid: it may not be read (`image_url_refused`), or cannot be (`image_unreachable`).
            TooLarge: it has more bytes.
        """
        until = time.monotonic() + SECONDS
        try:
            for _ in range(1 + REDIRECTS):
                found = self._ask(_Place.of(url, self._ports), most_bytes, until, caller)
                if isinstance(found, bytes):
                    return found
                url = urljoin(url, found)
        except (OSError, http.client.HTTPException, ValueError) as error:
            log.info("image_not_fetched", extra={"reason": type(error).__name__})
            raise Invalid("The image cannot be read from there.", code="image_unreachable") from error
        raise Invalid(f"The image's URL redirects more than {REDIRECTS} times.", code="image_unreachable")

    def _ask(self, place: _Place, most_bytes: int, until: float, caller: str) -> bytes | str:
        """The image, or where it is instead."""
        sock = self._connected(place, until, caller)
        with closing(sock), _shut_at(until, sock):
            if isinstance(sock, ssl.SSLSocket):
                sock.do_handshake()
            connection = http.client.HTTPConnection(place.host, place.port)
            connection.sock = sock
            connection.request("GET", place.target, headers={"Accept": "image/*", "Accept-Encoding": "identity"})
            with connection.getresponse() as answer:
                if answer.status in _MOVED and (location := answer.getheader("Location")):
                    return location
                if answer.status != http.client.OK:
                    raise Invalid(f"There is no image: the answer was {answer.status}.", code="image_unreachable")
                return _read(answer, most_bytes, until)

    def _connected(self, place: _Place, until: float, caller: str) -> socket.socket:
        threads = self._lookups.get(caller)
        if threads is None:
            threads = self._lookups[caller] = ThreadPool(_LOOKUPS, idle_task_timeout=_IDLE_S)
        addresses = run_with_timeout(_left(until), threads, lambda: self._resolve(place.host, place.port))
        if not addresses or not all(map(self._public, addresses)):
            raise _refused("The URL leads to no public address.")
        raw = _first_that_answers(addresses, place.port, until)
        if not place.secure:
            return raw
        try:
            context = ssl.create_default_context()
            return context.wrap_socket(raw, server_hostname=place.host, do_handshake_on_connect=False)
        except BaseException:
            raw.close()
            raise


def _refused(why: str) -> Invalid:
    return Invalid(why, code="image_url_refused")


def _first_that_answers(addresses: Sequence[str], port: int, until: float) -> socket.socket:
    """A connection to one of them, the first if possible."""
    error = OSError("no address")
    for address in dict.fromkeys(addresses):
        try:
            sock = socket.create_connection((address, port), timeout=min(_left(until), _CONNECT_S))
        except OSError as failed:
            error = failed
        else:
            sock.settimeout(SECONDS)  # `_shut_at` is what ends it
            return sock
    raise error


@contextmanager
def _shut_at(until: float, sock: socket.socket) -> Iterator[None]:
    """End a connection when its time is over: a peer that says a byte now and then keeps any other timeout from it."""

    def shut() -> None:
        with suppress(OSError):  # it has ended by itself
            # Of a plain socket: an SSL socket's own would first forget that it is one, and go on in the clear.
            socket.socket.shutdown(sock, socket.SHUT_RDWR)

    timer = threading.Timer(_left(until), shut)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _read(answer: http.client.HTTPResponse, most_bytes: int, until: float) -> bytes:
    """The body, as far as it is allowed to go and in the time that is left."""
    if answer.getheader("Content-Encoding", "identity") != "identity":
        raise Invalid("The image comes packed in another way than was asked for.", code="image_unreachable")
    pieces: list[bytes] = []
    size = 0
    while piece := answer.read1(_PIECE):
        size += len(piece)
        if size > most_bytes:
            raise TooLarge(f"The image has more than {most_bytes:,} bytes.", code="image_too_large")
        pieces.append(piece)
    _left(until)  # or it is not the end of the image, but of our patience
    return b"".join(pieces)


def _left(until: float) -> float:
    left = until - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left
