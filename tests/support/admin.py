"""An operator, who switches models over the API."""

from __future__ import annotations

from typing import Any

import httpx2

from tests.plugins.stack import Stack
from tests.support.waiting import eventually


class Admin:
    """An operator's requests."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self.http = httpx2.Client(base_url=stack.url, headers={"X-API-Key": stack.key}, timeout=60)

    def begin(self, verb: str, model: str, **more: Any) -> str:
        """Begin an operation; where to look at it."""
        answer = self.http.post(f"/inference/{verb}_model", json={"model": model, **more})
        assert answer.status_code == 202, answer.text
        return str(answer.headers["Location"])

    def look(self, where: str) -> dict[str, Any]:
        """An operation as it is now."""
        found: dict[str, Any] = self.http.get(where).json()
        return found

    def end(self, where: str) -> dict[str, Any]:
        """An operation at its end."""
        eventually(lambda: self.look(where)["state"] in ("succeeded", "failed"), f"{where} ends", 60)
        return self.look(where)

    def ask(self, verb: str, model: str, **more: Any) -> dict[str, Any]:
        """Begin an operation and wait for its end."""
        return self.end(self.begin(verb, model, **more))

    def models(self) -> dict[str, dict[str, Any]]:
        return {model["id"]: model for model in self.http.get("/inference/models").json()["data"]}

    def say(self, model: str, text: str = "hello", **more: Any) -> httpx2.Response:
        return self.http.post("/inference", json={"model": model, "prompt": text, "temperature": 0, **more})
