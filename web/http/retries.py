"""Whether the official clients of OpenAI and Anthropic should repeat a request that has failed."""

from __future__ import annotations

from typing import Final

from shared.errors import MlxqError

_REPEATED: Final = frozenset({408, 409, 429})
_MAY_SUCCEED_LATER: Final = frozenset({408, 429})


def retry_headers(error: MlxqError) -> dict[str, str]:
    """Return the header that tells clients whether to repeat a request; none for errors that they never repeat.

    A job that failed would fail again, and its record remains for the caller.
    """
    if error.status not in _REPEATED and error.status < 500:
        return {}
    repeat = error.retry_after is not None or error.status in _MAY_SUCCEED_LATER
    return {"X-Should-Retry": "true" if repeat else "false"}
