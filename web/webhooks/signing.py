"""Signatures of webhooks, and the secrets for them (https://www.standardwebhooks.com)."""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

_PREFIX: Final = "whsec_"
_BYTES: Final = 32
MAX_SECRETS: Final = 4
"""Maximum secrets with which one webhook is signed."""


@dataclass(frozen=True, slots=True)
class Secret:
    """A secret.

    Attributes:
        expires_at: seconds since the epoch after which it is no longer used; None for the current one.
    """

    text: str
    expires_at: float | None = None


def new_secret() -> str:
    """Generate a secret."""
    return _PREFIX + base64.b64encode(secrets.token_bytes(_BYTES)).decode()


def valid_secrets(known: Iterable[Secret], now: float) -> list[Secret]:
    """Return the secrets that have not expired, the current one first."""
    return [secret for secret in known if secret.expires_at is None or secret.expires_at > now]


def rotate(known: Sequence[Secret], now: float, overlap_s: float) -> list[Secret]:
    """Return the secrets after a rotation: a new one, and the earlier ones for `overlap_s` at most."""
    until = now + overlap_s
    earlier = [
        replace(secret, expires_at=min(secret.expires_at or until, until))
        for secret in valid_secrets(known, now)
        if overlap_s > 0
    ]
    return [Secret(new_secret()), *earlier][:MAX_SECRETS]


def secrets_to_json(known: Iterable[Secret]) -> list[dict[str, Any]]:
    """Return secrets as they are stored."""
    return [asdict(secret) for secret in known]


def secrets_from_json(data: Iterable[Mapping[str, Any]]) -> list[Secret]:
    """Read stored secrets."""
    return [Secret(entry["text"], entry.get("expires_at")) for entry in data]


def headers(known: Iterable[Secret], webhook_id: str, timestamp: int, body: bytes) -> dict[str, str]:
    """Return the headers that identify and sign a webhook. It has one signature per secret."""
    content = f"{webhook_id}.{timestamp}.".encode() + body
    signatures = [_signature(secret.text, content) for secret in known]
    return {
        "webhook-id": webhook_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": " ".join(signatures),
    }


def _signature(secret: str, content: bytes) -> str:
    key = base64.b64decode(secret.removeprefix(_PREFIX))
    return "v1," + base64.b64encode(hmac.new(key, content, hashlib.sha256).digest()).decode()
