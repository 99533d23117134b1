"""Python's garbage collector, kept from stopping a process that has many streams or a large library to look through."""

from __future__ import annotations

import gc
from typing import Final

_THRESHOLDS: Final = (10_000, 20, 20)
"""A burst of a thousand events is no reason to collect: it is gone before anybody looks."""


def settle() -> None:
    """Call it once a process has imported and loaded what it will keep: that is never looked through again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_THRESHOLDS)
