"""Streams of the Responses API, checked against the models of OpenAI's client."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

Json = dict[str, Any]
EVENTS: TypeAdapter[ResponseStreamEvent] = TypeAdapter(ResponseStreamEvent)


def checked(events: Iterable[Any]) -> list[Json]:
    """Return the events of a stream as sent, after checking each against the client's models, and their numbers."""
    sent: list[Json] = [event.to_dict() for event in events]
    for event in sent:
        EVENTS.validate_python(event)
    numbers = [event["sequence_number"] for event in sent]
    assert numbers == list(range(numbers[0], numbers[0] + len(sent))) if numbers else True
    return sent


def known(response: Response) -> Json:
    """Everything but ids and times."""
    dumped = response.model_dump(exclude={"id", "created_at", "completed_at"})
    for item in dumped["output"]:
        item.pop("id")
        item.pop("call_id", None)
    return dumped


def kinds(events: Sequence[Json]) -> list[str]:
    """The types of events; of several deltas in a row, the first."""
    types = [event["type"].removeprefix("response.") for event in events]
    return [each for i, each in enumerate(types) if not (each.endswith("delta") and i and types[i - 1] == each)]
