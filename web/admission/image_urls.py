"""Fetch images from http(s) URLs. Every redirect is checked like a new URL; see `web.http.outbound`."""

from __future__ import annotations

import http.client
import logging
import time
from collections.abc import Callable, Mapping
from typing import Final
from urllib.parse import urljoin

from shared.errors import Invalid, TooLarge
from web.http.outbound import (
    DEFAULT_PORTS,
    Outbound,
    Resolve,
    Target,
    UrlRefused,
    is_public_address,
    parse_url,
    remaining_s,
    resolve_host,
)

log = logging.getLogger(__name__)

TIMEOUT_S: Final = 10.0
"""For an image as a whole: name resolution, connections, redirects and transfer."""
MAX_REDIRECTS: Final = 3
_REDIRECT_STATUSES: Final = (301, 302, 303, 307, 308)
_CHUNK_BYTES: Final = 64 * 2**10


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
        ports: Mapping[str, int] | None = DEFAULT_PORTS,
    ) -> None:
        self._outbound = Outbound(resolve, is_allowed)
        self._ports = ports

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
                content = self._get(parse_url(url, self._ports), max_bytes, deadline, caller)
                if isinstance(content, bytes):
                    return content
                url = urljoin(url, content)
        except UrlRefused as error:
            raise Invalid(str(error), code="image_url_refused") from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            log.info("image_fetch_failed", extra={"reason": type(error).__name__})
            raise Invalid("The URL of the image cannot be read.", code="image_unreachable") from error
        raise Invalid(f"The URL of the image redirects more than {MAX_REDIRECTS} times.", code="image_unreachable")

    def _get(self, target: Target, max_bytes: int, deadline: float, caller: str) -> bytes | str:
        """Return the content, or the location of a redirect."""
        with self._outbound.connection(target, deadline, caller) as connection:
            connection.request("GET", target.path, headers={"Accept": "image/*", "Accept-Encoding": "identity"})
            with connection.getresponse() as response:
                if response.status in _REDIRECT_STATUSES and (location := response.getheader("Location")):
                    return location
                if response.status != http.client.OK:
                    detail = f"The URL of the image returned status {response.status}."
                    raise Invalid(detail, code="image_unreachable")
                return _read(response, max_bytes, deadline)


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
    remaining_s(deadline)  # raises if the body ended because `_shutdown_at` cut it off
    return b"".join(chunks)
