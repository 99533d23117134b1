"""Sessions of the console: a cookie with a random token stands for the API key that signed in.

Redis has only a hash of the token, so that neither its files nor its backups let anyone sign in.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from dataclasses import dataclass
from typing import Final

from shared.redis import keys
from shared.redis.client import Redis

COOKIE: Final = "mlxq_session"
LIFETIME_S: Final = 12 * 3600
"""How long a session lasts after the sign-in."""


@dataclass(frozen=True, slots=True)
class Session:
    """A session that exists. Its key may have been revoked since.

    Attributes:
        token: the value of the cookie.
        key_id: id of the API key that signed in.
    """

    token: str
    key_id: str

    @property
    def csrf_token(self) -> str:
        """The token that unsafe requests of this session must repeat. Other sites cannot read it."""
        return hmac.digest(self.token.encode(), b"csrf", "sha256").hex()

    def accepts(self, csrf_token: str) -> bool:
        """Whether this is the session's CSRF token, in constant time."""
        return hmac.compare_digest(self.csrf_token.encode(), csrf_token.encode())


class Sessions:
    """The sessions in Redis. Methods raise `redis.RedisError` if Redis is unreachable."""

    def __init__(self, client: Redis) -> None:
        self._client = client

    def begin(self, key_id: str) -> Session:
        """Begin a session of an API key."""
        session = Session(secrets.token_urlsafe(32), key_id)
        self._client.set(_name(session.token), key_id, ex=LIFETIME_S)
        return session

    def find(self, token: str) -> Session | None:
        """Return the session of a cookie; None if it has ended."""
        key_id = self._client.get(_name(token))
        return Session(token, key_id) if key_id else None

    def end(self, session: Session) -> None:
        """End a session."""
        self._client.delete(_name(session.token))


def _name(token: str) -> str:
    return keys.SESSION + hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()
