"""What is asked of a contender: clients, each with its requests, in order.

A plan is data, so that every contender gets the same one, in this process or another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Ask:
    """One chat request.

    Attributes:
        at_s: not before so many seconds after the plan's start.
        kind: a word by which a scenario finds its samples again.
        batch: whether it may wait for the others; only this stack can be told.
    """

    messages: list[Json]
    max_tokens: int
    at_s: float = 0.0
    kind: str = ""
    batch: bool = False


@dataclass(frozen=True, slots=True)
class Client:
    """Requests sent one after another, each when its time has come and the one before has ended.

    Attributes:
        background: not waited for; what it has under way is cut when all others have ended.
    """

    asks: list[Ask]
    background: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """All clients of a measurement."""

    clients: list[Client] = field(default_factory=list)

    @classmethod
    def from_json(cls, data: Json) -> Self:
        """Read what `dataclasses.asdict` made of one."""
        return cls([Client([Ask(**ask) for ask in each["asks"]], each["background"]) for each in data["clients"]])


def closed(asks: Sequence[Sequence[Ask]]) -> Plan:
    """Clients that begin at the same moment and send each next request when the last has ended."""
    return Plan([Client(list(each)) for each in asks])


def opened(asks: Sequence[Ask]) -> Plan:
    """Requests that come when they come, whatever became of the others."""
    return Plan([Client([ask]) for ask in asks])
