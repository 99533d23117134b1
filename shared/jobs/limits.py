"""The limits of an API key, as the queue applies them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Final, Self

from shared.errors import RateLimited
from shared.settings import Settings

MIN_WEIGHT: Final = 0.01
MAX_WEIGHT: Final = 100.0
"""Turns of a key are `1 / weight` apart; scores in the queue distinguish steps of a thousandth."""
MAX_LIMIT: Final = 10**12
UNLIMITED: Final = 0


@dataclass(frozen=True, slots=True)
class OwnerLimits:
    """What an API key may use. None stands for the service's default, 0 for no limit.

    Attributes:
        weight: the key's share of a model, relative to other keys with waiting jobs of the same class.
        max_queued: maximum number of waiting jobs per model; at least 1.
        max_queued_bytes: maximum Redis memory that its unfinished jobs may reserve; at least 1.
        max_running: maximum number of running jobs, of all models together. Further jobs wait.
        tokens_per_minute: tokens of prompts and answers per minute, on average.
        tokens_per_day: tokens of prompts and answers per day (UTC).
    """

    weight: float = 1.0
    max_queued: int | None = None
    max_queued_bytes: int | None = None
    max_running: int | None = None
    tokens_per_minute: int | None = None
    tokens_per_day: int | None = None

    def check(self) -> Self:
        """Return the limits if they are valid.

        Raises:
            ValueError: a limit is out of range. The message names it.
        """
        if not (math.isfinite(self.weight) and MIN_WEIGHT <= self.weight <= MAX_WEIGHT):
            raise ValueError(f"weight must be from {MIN_WEIGHT} to {MAX_WEIGHT:g}")
        for name, minimum in _MINIMA.items():
            value = getattr(self, name)
            if value is not None and not minimum <= value <= MAX_LIMIT:
                raise ValueError(f"{name} must be from {minimum} to {MAX_LIMIT}")
        return self

    def to_dict(self) -> dict[str, Any]:
        """Return the limits that differ from the default. Processes of earlier versions do not know the newer ones."""
        return {name: value for name, value in asdict(self).items() if value != getattr(STANDARD, name)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Read the limits in a dictionary that may have other fields too."""
        return cls(**{each.name: data[each.name] for each in fields(cls) if each.name in data})

    def with_defaults(self, settings: Settings) -> Self:
        """Return the limits with the service's defaults in place of None. `max_queued_bytes` 0: chosen by the queue."""
        queue = settings.max_queue_per_key
        memory = settings.queue_bytes_per_key
        defaults = {
            "max_queued": max(1, settings.max_queue // 4) if queue == "auto" else queue,
            "max_queued_bytes": 0 if memory == "auto" else memory,
            "max_running": settings.max_running_per_key,
            "tokens_per_minute": settings.tokens_per_minute_per_key,
            "tokens_per_day": settings.tokens_per_day_per_key,
        }
        return replace(self, **{name: value for name, value in defaults.items() if getattr(self, name) is None})


STANDARD: Final = OwnerLimits()
"""The limits of a key that has none of its own."""


@dataclass(frozen=True, slots=True)
class TokensLeft:
    """What is left of an API key's token limits. If it lacks a limit, the fields of that limit are None.

    Attributes:
        minute_limit, day_limit: the limits.
        minute_left, day_left: tokens left, after those that unfinished jobs are expected to use.
        minute_reset_s, day_reset_s: seconds until the whole limit is available again, if no job is submitted.
    """

    minute_limit: int | None
    minute_left: int | None
    minute_reset_s: float
    day_limit: int | None
    day_left: int | None
    day_reset_s: float

    @classmethod
    def from_reply(cls, reply: Sequence[str]) -> Self:
        """Parse what `lib/limits.lua` returns: limit, rest and seconds, for the minute and the day. Limit 0: none."""
        minute, day = (_token_limit(*reply[start : start + 3]) for start in (0, 3))
        return cls(*minute, *day)


class TokensExceeded(RateLimited):
    """The API key has used its tokens.

    Attributes:
        left: what its limits leave.
    """

    left: TokensLeft | None = None


def _token_limit(limit: str, left: str, reset_s: str) -> tuple[int | None, int | None, float]:
    return (int(limit), max(0, int(float(left))), float(reset_s)) if int(limit) else (None, None, 0.0)


_MINIMA: Final = {
    "max_queued": 1,
    "max_queued_bytes": 1,
    "max_running": UNLIMITED,
    "tokens_per_minute": UNLIMITED,
    "tokens_per_day": UNLIMITED,
}
