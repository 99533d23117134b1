"""Responses that stay open for long, such as streams and long polls: their number per API key, and their end."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable
from typing import Any, Protocol

from flask import Response

from shared.errors import RateLimited
from web.access.api_keys import KeyStore

log = logging.getLogger(__name__)

_RETRY_AFTER_S = 5


class _Abortable(Protocol):
    def abort(self) -> None: ...


class OpenResponse:
    """One open response. It counts until it is closed; as a context manager, until the block ends."""

    def __init__(self, connection: _Abortable | None, close: Callable[[OpenResponse], None]) -> None:
        self._connection = connection
        self._close = close

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Count the response no longer."""
        self._close(self)

    def abort(self) -> None:
        """End the response now."""
        if self._connection is not None:
            self._connection.abort()


class OpenResponses:
    """The open responses of this process."""

    def __init__(self, max_per_key: int) -> None:
        self._max_per_key = max_per_key
        self._by_key: defaultdict[str, set[OpenResponse]] = defaultdict(set)

    def open(self, key_id: str, connection: Any) -> OpenResponse:
        """Count a response to a key.

        Args:
            connection: `environ["gunicorn.socket"]`; None with another server.

        Raises:
            RateLimited: the key has too many.
        """
        responses = self._by_key[key_id]
        if len(responses) >= self._max_per_key:
            detail = f"This API key has {self._max_per_key} streams and waiting requests, which is the maximum."
            raise RateLimited(detail, code="too_many_streams", retry_after=_RETRY_AFTER_S)
        response = OpenResponse(connection, lambda closed: self._closed(key_id, closed))
        responses.add(response)
        return response

    def respond(self, key_id: str, connection: Any, make: Callable[[], Response]) -> Response:
        """Make a response and count it until it has been sent. Raises like `open`, before anything is made."""
        opened = self.open(key_id, connection)
        try:
            response = make()
        except BaseException:
            opened.close()
            raise
        response.call_on_close(opened.close)
        return response

    def abort_revoked(self, keys: KeyStore) -> None:
        """End the responses to keys that have been revoked."""
        for key_id in [key_id for key_id in self._by_key if not keys.is_valid(key_id)]:
            responses = [*self._by_key[key_id]]
            log.info("responses_to_revoked_key_ended", extra={"key_id": key_id, "count": len(responses)})
            for response in responses:
                response.abort()

    def _closed(self, key_id: str, response: OpenResponse) -> None:
        self._by_key[key_id].discard(response)
        if not self._by_key[key_id]:
            del self._by_key[key_id]
