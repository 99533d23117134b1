"""How the tests' Valkeys are set: as the product sets its own."""

from __future__ import annotations

from typing import Final

DURABLE: Final = {"appendonly": "yes", "appendfsync": "always"}
