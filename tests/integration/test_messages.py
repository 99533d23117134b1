"""Messages through the whole stack, with a worker that answers from a script: streams, views, and workers that die."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from shared.redis import keys
from tests.plugins.stack import Stack, made_stack
from tests.support.waiting import eventually
from worker.output.parser import merged

Json = dict[str, Any]
TOOLS = [
    {"type": "function", "function": {"name": "write_file", "parameters": {"type": "object"}}},
    {"type": "function", "function": {"name": "read_file", "parameters": {"type": "object"}}},
]
REASONING = "The user wants a file. I write it first, then I read it."
CONTENT = "I write the file « é🙂 » now."
WRITE = {"path": "notes/a.txt", "content": "line one\nline two </tool_call> with a marker\n"}
READ = {"path": "notes/a.txt"}
ANSWER = (
    f"<think>\n{REASONING}\n</think>\n\n{CONTENT}\n"
    f"<tool_call>\n{json.dumps({'name': 'write_file', 'arguments': WRITE})}\n</tool_call>\n"
    f"<tool_call>\n{json.dumps({'name': 'read_file', 'arguments': READ})}\n</tool_call>"
)
SLOW = "!every=0.01"
SCRIPT = [
    {"match": "file", "text": ANSWER, "directives": SLOW},
    {"match": "think without end", "text": "<think>\nHm, hm, hm, hm, hm, hm, hm.", "directives": ""},
    {"match": "sum", "text": "<think>1 + 1</think>\n\nIt is 2."},
]


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("script") / "script.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in SCRIPT))
    return path


@pytest.fixture(scope="module")
def stack(script: Path) -> Iterator[Stack]:
    """The API and two workers. A test that kills one starts another."""
    for stack in made_stack(Path("fake"), {"BACKEND": "scripted", "SCRIPT_FILE": str(script), "LEASE_S": "2"}):
        stack.start_web()
        for _ in range(2):
            stack.spawn_worker()
        eventually(lambda stack=stack: len(stack.ready_workers()) == 2, "the workers are ready", 60)  # type: ignore[misc]
        yield stack


def body(text: str, **more: Any) -> Json:
    return {"messages": [{"role": "user", "content": text}], "parse": "message", "max_tokens": 500, **more}


def submit(stack: Stack, request: Json) -> Json:
    with stack.client() as client:
        job: Json = client.request("POST", "/v1/jobs", json=request).json()
        return job


def stream(stack: Stack, job: Json, on_chunk: Callable[[str], object] = lambda _text: None) -> list[Json]:
    """Return a job's events. `on_chunk` gets the text so far after each chunk."""
    events, text = [], ""
    with (
        stack.client() as client,
        client.stream("GET", job["urls"]["stream"], headers={"Accept": "application/x-ndjson"}) as response,
    ):
        for line in response.iter_lines():
            event = json.loads(line)
            if "id" not in event:
                continue
            events.append(event)
            if event["event"] == "chunk":
                text += event["data"]["text"]
                on_chunk(text)
    return events


def kill_worker_of(stack: Stack, job_id: str) -> int:
    """Kill the worker that runs a job, and start another one; return the process id of the first."""
    holder = stack.redis.hget(keys.JOB + job_id, "worker")
    (pid,) = (worker.pid for worker in stack.registry.workers() if worker.id == holder)
    (child,) = (child for child in stack.processes if child.pid == pid)
    child.kill()
    child.wait()
    stack.spawn_worker()
    return pid


def chunks(events: list[Json]) -> list[Json]:
    return [event["data"] for event in events if event["event"] == "chunk"]


def message_of(events: list[Json]) -> Json:
    """Return the message in the deltas of a stream, with the names and arguments of its calls only."""
    message = merged(chunk["delta"] for chunk in chunks(events))
    calls = [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in message["tool_calls"]]
    return {"reasoning": message["reasoning_content"], "content": message["content"], "calls": calls}


WHOLE = {"reasoning": REASONING, "content": CONTENT, "calls": [("write_file", WRITE), ("read_file", READ)]}


def test_the_deltas_of_a_stream_are_the_message_of_the_job(stack: Stack) -> None:
    events = stream(stack, submit(stack, body("a file", tools=TOOLS)))
    assert message_of(events) == WHOLE
    done = events[-1]["data"]
    deltas = merged(chunk["delta"] for chunk in chunks(events))
    calls = [{name: value for name, value in call.items() if name != "index"} for call in deltas["tool_calls"]]
    assert done["message"] == {
        "role": "assistant",
        "content": CONTENT,
        "reasoning_content": REASONING,
        "tool_calls": calls,
    }
    assert done["output"]["text"] == "".join(chunk["text"] for chunk in chunks(events)) == ANSWER
    assert 10 < done["usage"]["reasoning_tokens"] < done["usage"]["completion_tokens"] / 2


@pytest.mark.parametrize(
    "point", ["I write it", "« é", '"write_file", "arguments"', "line two </tool_call>", '"read_file"']
)
def test_a_worker_that_is_killed_leaves_the_rest_of_the_message_to_the_next(stack: Stack, point: str) -> None:
    job, killed = submit(stack, body("a file", tools=TOOLS)), list[int]()

    def kill_once(text: str) -> None:
        if not killed and point in text:
            killed.append(kill_worker_of(stack, job["id"]))

    events = stream(stack, job, kill_once)
    assert message_of(events) == WHOLE
    done = events[-1]["data"]
    assert done["attempt"] >= 2  # a lease may lapse on a busy machine
    assert "".join(chunk["text"] for chunk in chunks(events)) == ANSWER
    assert [call["id"] for call in done["message"]["tool_calls"]] == [
        call["id"] for chunk in chunks(events) for call in chunk["delta"].get("tool_calls", ())
    ]


def test_the_answer_ends_after_one_call_if_it_may_have_no_other(stack: Stack) -> None:
    done = stream(stack, submit(stack, body("a file", tools=TOOLS, parallel_tool_calls=False)))[-1]["data"]
    assert [call["function"]["name"] for call in done["message"]["tool_calls"]] == ["write_file"]
    assert done["output"]["finish_reason"] == "stop"
    assert done["output"]["text"] == ANSWER[: ANSWER.rindex("\n<tool_call>")]


@pytest.mark.parametrize("more", [{}, {"tools": TOOLS, "tool_choice": "none"}])
def test_without_tools_the_text_of_a_call_is_content(stack: Stack, more: Json) -> None:
    done = stream(stack, submit(stack, body("a file", **more)))[-1]["data"]
    assert done["message"]["tool_calls"] is None
    assert done["message"]["content"].startswith(CONTENT + "\n<tool_call>")


def test_inference_returns_the_message(stack: Stack) -> None:
    with stack.client() as client:
        answer = client.request("POST", "/inference", json=body("the sum")).json()
        plain = client.request("POST", "/inference", json=body("the sum", parse=None)).json()
    assert answer["message"] == {
        "role": "assistant",
        "content": "It is 2.",
        "reasoning_content": "1 + 1",
        "tool_calls": None,
    }
    assert answer["text"] == plain["text"] == "<think>1 + 1</think>\n\nIt is 2."
    assert "message" not in plain
    assert (answer["usage"]["reasoning_tokens"], plain["usage"]["reasoning_tokens"]) == (5, None)


def test_reasoning_that_max_tokens_cuts_is_reasoning(stack: Stack) -> None:
    done = stream(stack, submit(stack, body("think without end", max_tokens=6)))[-1]["data"]
    assert done["output"]["finish_reason"] == "length"
    assert done["message"]["reasoning_content"] == "Hm, hm, hm"
    assert done["message"]["content"] == ""
    assert done["usage"]["reasoning_tokens"] == 6


def test_log_probabilities_of_the_content_can_be_told_from_others(stack: Stack) -> None:
    events = stream(stack, submit(stack, body("a file", tools=TOOLS, logprobs=1)))
    entries = [entry for chunk in chunks(events) for entry in chunk["logprobs"]]
    runs = merged(chunk["delta"] for chunk in chunks(events))["content_tokens"]
    content = [entry["token"] for start, end in zip(runs[::2], runs[1::2], strict=True) for entry in entries[start:end]]
    assert "".join(content).strip() == CONTENT
    assert len(entries) == len(events[-1]["data"]["output"]["logprobs"])
