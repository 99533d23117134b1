"""Configuration of Valkey servers in tests: the same durability as the embedded server."""

from __future__ import annotations

from typing import Final

DURABLE: Final = {"appendonly": "yes", "appendfsync": "always"}
