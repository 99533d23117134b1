"""The WSGI environment: what clients may set in it, and what the application leaves in it for its log."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from http import HTTPMethod
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from typing import TYPE_CHECKING, Final

from flask import Response, g, request

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

Network = IPv4Network | IPv6Network

KEY_ID: Final = "mlxq.key_id"
JOB_ID: Final = "mlxq.job_id"
"""Entries for the access log and traces: the API key, and the job that a request creates or is about."""
QUEUE_POSITION: Final = "mlxq.queue_position"
"""Entry for the access log and traces: the place in the queue of the job that a request creates, from 1."""
OTHER: Final = "OTHER"
_KNOWN: Final = frozenset(HTTPMethod)


def networks(text: str) -> tuple[Network, ...]:
    """Read addresses and networks such as `127.0.0.1, 10.0.0.0/8`."""
    return tuple(ip_network(each.strip()) for each in text.split(",") if each.strip())


def until_closed(body: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the body of a response, and close it at its end or when the server closes this generator."""
    try:
        yield from body
    finally:
        close = getattr(body, "close", None)
        if close is not None:
            close()


def note_caller(response: Response) -> Response:
    """Leave the ids of the API key and the job for the access log, which has only the WSGI environment."""
    if key := g.get("key"):
        request.environ[KEY_ID] = key.id
    if job_id := (request.view_args or {}).get("job_id"):
        request.environ[JOB_ID] = job_id
    return response


class ProxyMiddleware:
    """Sets `REMOTE_ADDR` to the client of a trusted proxy, and the scheme to the one that the client used.

    Headers of proxies are ignored unless the connection comes from a trusted proxy: otherwise any client could choose
    the address that rate limits and logs see.
    """

    def __init__(self, app: WSGIApplication, trusted: tuple[Network, ...]) -> None:
        self._app = app
        self._trusted = trusted

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Serve a request."""
        peer = environ.get("REMOTE_ADDR", "")
        environ["REMOTE_ADDR"] = self._client(peer, environ.get("HTTP_X_FORWARDED_FOR", ""))
        if self._is_trusted(peer) and environ.get("HTTP_X_FORWARDED_PROTO", "").strip() == "https":
            environ["wsgi.url_scheme"] = "https"  # cookies of the console are then marked as secure
        return self._app(environ, start_response)

    def _client(self, address: str, forwarded_for: str) -> str:
        """Follow the chain of proxies from the nearest one, for as long as they are trusted."""
        for client in reversed(forwarded_for.split(",")):
            if not self._is_trusted(address) or not _is_address(client.strip()):
                break
            address = client.strip()
        return address

    def _is_trusted(self, address: str) -> bool:
        return _is_address(address) and any(ip_address(address) in network for network in self._trusted)


def _is_address(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return True


class KnownMethods:
    """Calls all unknown methods `OTHER`: each method is a label of metrics, so they are bounded.

    Flask responds with 405, as it would to the original method.
    """

    def __init__(self, app: WSGIApplication) -> None:
        self._app = app

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Serve a request."""
        if environ["REQUEST_METHOD"] not in _KNOWN:
            environ["REQUEST_METHOD"] = OTHER
        return self._app(environ, start_response)
