"""Messages of a newer version are read: what is unknown in them is passed over."""

from __future__ import annotations

import json

import pytest

from shared.jobs.request import Request, Sampling
from shared.models.registry import ModelCard, WorkerInfo

MESSAGES = (
    ModelCard("m", "text", context=64, chat_template="{{ messages }}"),
    WorkerInfo("w", "node", "host", 1, "m", "ready", 8, 2, 1.0, 2.0, {"steps": 3.0}, {"device": "cpu"}),
    Request("m", 9, Sampling(0.5, seed=7), prompt="hi", stop=("x",)),
    Request("m", 9, Sampling(0.5), messages=({"role": "user", "content": "hi"},)),
)
Message = ModelCard | WorkerInfo | Request


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_message_is_read_as_it_was_written(message: Message) -> None:
    assert type(message).from_json(message.to_json()) == message


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_what_a_newer_peer_adds_is_dropped(message: Message) -> None:
    data = json.loads(message.to_json()) | {"novelty": [1]}
    if isinstance(message, Request):
        data["sampling"]["novelty"] = 1
    assert type(message).from_json(json.dumps(data)) == message
