"""A client of the API that loads and unloads models."""

from __future__ import annotations

from typing import Any

import httpx2

from tests.plugins.stack import Stack
from tests.support.waiting import eventually


class Admin:
    """Requests of an operator."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self.http = httpx2.Client(base_url=stack.url, headers={"X-API-Key": stack.key}, timeout=60)

    def begin(self, verb: str, model: str, **options: Any) -> str:
        """Start an operation and return its URL."""
        response = self.http.post(f"/inference/{verb}_model", json={"model": model, **options})
        assert response.status_code == 202, response.text
        return str(response.headers["Location"])

    def look(self, url: str) -> dict[str, Any]:
        """Return the current state of an operation."""
        operation: dict[str, Any] = self.http.get(url).json()
        return operation

    def end(self, url: str) -> dict[str, Any]:
        """Wait for the end of an operation and return it."""
        eventually(lambda: self.look(url)["state"] in ("succeeded", "failed", "cancelled"), f"{url} ends", 60)
        return self.look(url)

    def ask(self, verb: str, model: str, **options: Any) -> dict[str, Any]:
        """Start an operation, wait for its end and return it."""
        return self.end(self.begin(verb, model, **options))

    def models(self) -> dict[str, dict[str, Any]]:
        return {model["id"]: model for model in self.http.get("/inference/models").json()["data"]}

    def say(self, model: str, text: str = "hello", **options: Any) -> httpx2.Response:
        return self.http.post("/inference", json={"model": model, "prompt": text, "temperature": 0, **options})
