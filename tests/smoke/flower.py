"""Checks of Flower: closed to strangers, and it sees the workers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import httpx2

from tests.smoke.probe import require

SEEN_S = 10.0


@dataclass(frozen=True, slots=True)
class Flower:
    """Where it is and how one gets in."""

    url: str
    user: str
    password: str

    def get(self, path: str, *, known: bool = True) -> httpx2.Response:
        """An answer, to somebody who knows the password or not."""
        auth = httpx2.BasicAuth(self.user, self.password) if known else None
        return httpx2.get(self.url + path, auth=auth, timeout=SEEN_S)


def closed(flower: Flower) -> None:
    """Nobody gets in without the password."""
    status = flower.get("/", known=False).status_code
    require(status == 401, f"answered {status} in place of 401")


def open_(flower: Flower) -> None:
    """The password opens."""
    status = flower.get("/").status_code
    require(status == 200, f"answered {status} in place of 200")


def workers(flower: Flower) -> None:
    """At least one worker is listed."""
    # `refresh`: Flower asks the workers now, whatever it has heard so far.
    response = flower.get("/api/workers?refresh=1")
    require(response.status_code == 200, f"answered {response.status_code} in place of 200")
    require(response.json(), "lists no worker")


CHECKS: tuple[Callable[[Flower], None], ...] = (closed, open_, workers)
