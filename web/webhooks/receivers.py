"""Who receives webhooks: endpoints that an admin has registered, and the URLs of single jobs.

An endpoint has its own secrets. Webhooks to the URLs of jobs are signed with the secrets of the API key that submitted
the job. Secrets are stored in Redis in plain text, because signing needs them.
"""

from __future__ import annotations

import ipaddress
import json
import secrets
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Final, Self

from shared.errors import Conflict, Invalid, NotFound
from shared.redis import keys
from shared.redis.client import Redis
from shared.wire import known_fields
from web.http.outbound import Outbound, UrlRefused, is_public_address, parse_url
from web.webhooks.signing import Secret, new_secret, rotate, secrets_from_json, secrets_to_json, valid_secrets

MAX_ENDPOINTS: Final = 32
_RESOLVE_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A registered endpoint.

    Attributes:
        events: the types of events that it receives.
        created_at: seconds since the epoch.
    """

    id: str
    url: str
    events: tuple[str, ...]
    description: str
    created_at: float
    secrets: tuple[Secret, ...]

    def to_json(self) -> str:
        """Return the endpoint as it is stored."""
        return json.dumps({**asdict(self), "secrets": secrets_to_json(self.secrets)})

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read a stored endpoint, also one of another version."""
        data = known_fields(cls, json.loads(text))
        stored = tuple(secrets_from_json(data["secrets"]))
        return cls(**{**data, "events": tuple(data["events"]), "secrets": stored})


class UrlPolicy:
    """Decides which URLs may receive webhooks.

    Args:
        networks: networks that are allowed although they are not public, separated by commas.
    """

    def __init__(self, networks: str = "") -> None:
        self._networks = [ipaddress.ip_network(each.strip()) for each in networks.split(",") if each.strip()]
        self.outbound = Outbound(is_allowed=self.is_allowed)

    def is_allowed(self, address: str) -> bool:
        """Whether webhooks may be sent to an IP address."""
        if is_public_address(address):
            return True
        parsed = ipaddress.ip_address(address.split("%", 1)[0])
        parsed = getattr(parsed, "ipv4_mapped", None) or parsed
        return any(parsed in network for network in self._networks)

    def check(self, url: str, field: str, caller: str) -> None:
        """Check a URL that an API key sends.

        Raises:
            Invalid: it is malformed, cannot be resolved, or leads to an address that is not allowed.
        """
        try:
            self.outbound.addresses(parse_url(url), time.monotonic() + _RESOLVE_S, caller)
        except UrlRefused as error:
            raise Invalid(str(error), code="webhook_url_refused", field=field) from None
        except OSError:
            detail = "The host name of the URL cannot be resolved."
            raise Invalid(detail, code="webhook_url_refused", field=field) from None


class Receivers:
    """The receivers in Redis. Methods raise `redis.RedisError` if Redis is unreachable."""

    def __init__(self, client: Redis) -> None:
        self._client = client

    def register(self, url: str, events: Sequence[str], description: str) -> Endpoint:
        """Register an endpoint.

        Raises:
            Conflict: there are too many.
        """
        if self._client.hlen(keys.WEBHOOK_ENDPOINTS) >= MAX_ENDPOINTS:
            raise Conflict(f"There are {MAX_ENDPOINTS} endpoints, which is the maximum.", code="too_many_endpoints")
        endpoint = Endpoint(
            f"we_{secrets.token_hex(12)}", url, tuple(events), description, time.time(), (Secret(new_secret()),)
        )
        self._store(endpoint)
        return endpoint

    def endpoints(self) -> list[Endpoint]:
        """Return all endpoints, oldest first."""
        stored = map(Endpoint.from_json, self._client.hvals(keys.WEBHOOK_ENDPOINTS))
        return sorted(stored, key=lambda endpoint: endpoint.created_at)

    def get(self, endpoint_id: str) -> Endpoint:
        """Return an endpoint.

        Raises:
            NotFound: it does not exist.
        """
        text = self._client.hget(keys.WEBHOOK_ENDPOINTS, endpoint_id)
        if text is None:
            raise NotFound("There is no such webhook endpoint.", code="webhook_not_found")
        return Endpoint.from_json(text)

    def remove(self, endpoint_id: str) -> None:
        """Remove an endpoint. Deliveries to it that wait are given up.

        Raises:
            NotFound: it does not exist.
        """
        self.get(endpoint_id)
        self._client.hdel(keys.WEBHOOK_ENDPOINTS, endpoint_id)

    def rotate(self, endpoint_id: str, overlap_s: float) -> Endpoint:
        """Give an endpoint a new secret. For `overlap_s`, webhooks are also signed with the earlier one."""
        endpoint = self.get(endpoint_id)
        rotated = replace(endpoint, secrets=tuple(rotate(endpoint.secrets, time.time(), overlap_s)))
        self._store(rotated)
        return rotated

    def key_secrets(self, owner: str) -> list[Secret]:
        """Return the secrets of an API key; create the first one."""
        known = self._known_secrets(owner)
        if known:
            return known
        first = json.dumps(secrets_to_json([Secret(new_secret())]))
        self._client.hsetnx(keys.WEBHOOK_SECRETS, owner, first)
        return self._known_secrets(owner)

    def rotate_key_secrets(self, owner: str, overlap_s: float) -> list[Secret]:
        """Give an API key a new secret, like `rotate`."""
        rotated = rotate(self._known_secrets(owner), time.time(), overlap_s)
        self._client.hset(keys.WEBHOOK_SECRETS, owner, json.dumps(secrets_to_json(rotated)))
        return rotated

    def forget_key(self, owner: str) -> None:
        """Delete the secrets of an API key."""
        self._client.hdel(keys.WEBHOOK_SECRETS, owner)

    def secrets_for(self, endpoint_id: str, owner: str) -> list[Secret]:
        """Return the secrets for a delivery to an endpoint, or, without one, to the URL of an API key's job.

        Raises:
            NotFound: the endpoint was removed.
        """
        known: Iterable[Secret] = self.get(endpoint_id).secrets if endpoint_id else self.key_secrets(owner)
        return valid_secrets(known, time.time())

    def _known_secrets(self, owner: str) -> list[Secret]:
        text = self._client.hget(keys.WEBHOOK_SECRETS, owner)
        return secrets_from_json(json.loads(text)) if text else []

    def _store(self, endpoint: Endpoint) -> None:
        self._client.hset(keys.WEBHOOK_ENDPOINTS, endpoint.id, endpoint.to_json())
