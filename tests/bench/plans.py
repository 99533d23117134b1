"""What a contender is asked to do: clients, each with its requests, in order.

A plan is data, so that every contender gets the same one, in this process or in another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """One chat request.

    Attributes:
        at_s: earliest time to send it, in seconds after the start of the plan.
        kind: a label by which a scenario finds its samples.
        batch: whether it has the batch priority class, which only this stack has.
    """

    messages: list[Json]
    max_tokens: int
    at_s: float = 0.0
    kind: str = ""
    batch: bool = False


@dataclass(frozen=True, slots=True)
class Client:
    """Requests that one client sends, each when its time has come and the previous answer is complete.

    Attributes:
        background: the plan does not wait for this client; its open requests are cancelled when all others have ended.
    """

    requests: list[ChatRequest]
    background: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """All clients of a measurement."""

    clients: list[Client] = field(default_factory=list)

    @classmethod
    def from_json(cls, data: Json) -> Self:
        """Read the output of `dataclasses.asdict`."""
        return cls([Client([ChatRequest(**each) for each in client["requests"]], client["background"])
                    for client in data["clients"]])  # fmt: skip


def closed(requests: Sequence[Sequence[ChatRequest]]) -> Plan:
    """A closed loop: clients that start together and send the next request when the previous answer is complete."""
    return Plan([Client(list(each)) for each in requests])


def opened(requests: Sequence[ChatRequest]) -> Plan:
    """An open loop: each request is sent at its own time, independently of the others."""
    return Plan([Client([each]) for each in requests])
