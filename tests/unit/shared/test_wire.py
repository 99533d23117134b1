"""Messages survive a round trip, and unknown fields of newer versions are ignored."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from shared.jobs.request import Constraint, Request, Sampling
from shared.models.registry import HostInfo, ModelCard, Registry, WorkerInfo
from shared.redis import keys
from shared.redis.client import Redis

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
MESSAGES = (
    ModelCard("m", "text", context=64, chat_template="{{ messages }}"),
    ModelCard("m", "text", context=64, reasoning=True, tool_format="json_tools", structured=True),
    Request("m", 9, Sampling(0.5, seed=7), prompt="hi", stop=("x",)),
    Request("m", 9, Sampling(0.5), messages=({"role": "user", "content": "hi"},)),
    Request(
        "m",
        9,
        Sampling(0.5),
        messages=({"role": "assistant", "content": None, "tool_calls": [{"id": "call_1", "type": "function"}]},),
        tools=(TOOL,),
        tool_choice="function:add",
        parallel_tool_calls=False,
        template_variables={"enable_thinking": False},
        continue_final=True,
        thinking_budget=5,
        constraint=Constraint("choice", '["a","b"]'),
        logit_bias=((7, -1.5), (8, 2.0)),
    ),
)
Message = ModelCard | Request
WORKER = WorkerInfo("w", "node", "host", 1, "m", "ready", 8, 2, 1.0, 2.0, {"steps": 3.0}, {"device": "cpu"})
HOST = HostInfo("node", "host", 1, 1.0, 2.0, ("m",), 100, 50, operations=("op_1",))


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_message_survives_a_round_trip(message: Message) -> None:
    assert type(message).from_json(message.to_json()) == message


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_unknown_fields_of_a_message_are_ignored(message: Message) -> None:
    data = json.loads(message.to_json()) | {"unknown": [1]}
    if isinstance(message, Request):
        data["sampling"]["unknown"] = 1
        if data["constraint"]:
            data["constraint"]["unknown"] = 1
    assert type(message).from_json(json.dumps(data)) == message


def test_request_of_an_earlier_version_is_read() -> None:
    request = Request("m", 9, Sampling(0.5), prompt="hi")
    data = json.loads(request.to_json())
    earlier = ("model", "max_tokens", "sampling", "prompt", "messages", "stop")
    assert Request.from_json(json.dumps({name: data[name] for name in earlier})) == request


def test_announced_state_survives_a_round_trip_with_times_of_the_server(client: Redis) -> None:
    registry = Registry(client)
    registry.announce_worker(WORKER, 60)
    registry.announce_host(HOST, 60)
    (now, (worker,)), (host,) = registry.workers_now(), registry.hosts()
    for card, announced in ((worker, WORKER), (host, HOST)):
        assert replace(card, started_at=1.0, heartbeat_at=2.0) == announced
        assert card.heartbeat_at == pytest.approx(now, abs=1)
        assert card.heartbeat_at - card.started_at == pytest.approx(1)


def test_unknown_fields_of_a_worker_are_ignored(client: Redis) -> None:
    registry = Registry(client)
    for name, info, key in ((WORKER.id, WORKER, keys.WORKER), (HOST.node, HOST, keys.HOST)):
        card = {"started_at": 1.0, "heartbeat_at": 2.0, "unknown": [1], **json.loads(info.to_json())}
        client.set(key + name, json.dumps(card))
    client.zadd(keys.WORKERS, {WORKER.id: 1})
    client.zadd(keys.HOSTS, {HOST.node: 1})
    assert (registry.workers(), registry.hosts()) == ([WORKER], [HOST])
