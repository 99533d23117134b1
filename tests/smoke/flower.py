"""Checks of Flower: it requires a password and lists the workers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import httpx2

from tests.smoke.probe import require

TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Flower:
    """Address and credentials."""

    url: str
    user: str
    password: str

    def get(self, path: str, *, login: bool = True) -> httpx2.Response:
        """Send a GET request, with or without the password."""
        auth = httpx2.BasicAuth(self.user, self.password) if login else None
        return httpx2.get(self.url + path, auth=auth, timeout=TIMEOUT_S)


def closed(flower: Flower) -> None:
    """A request without the password is rejected."""
    status = flower.get("/", login=False).status_code
    require(status == 401, f"answered {status} instead of 401")


def open_(flower: Flower) -> None:
    """The password is accepted."""
    status = flower.get("/").status_code
    require(status == 200, f"answered {status} instead of 200")


def workers(flower: Flower) -> None:
    """At least one worker is listed."""
    # With `refresh`, Flower queries the workers now.
    response = flower.get("/api/workers?refresh=1")
    require(response.status_code == 200, f"answered {response.status_code} instead of 200")
    require(response.json(), "lists no worker")


CHECKS: tuple[Callable[[Flower], None], ...] = (closed, open_, workers)
