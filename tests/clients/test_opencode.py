"""opencode with its own tools: it creates a file, reads it and finishes, while a worker is killed."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from scripts.client.launch import Target, opencode
from tests.plugins.stack import Stack
from tests.support.clients import environment, executable, run, scripted_stack, tool_call
from tests.support.waiting import eventually

pytestmark = pytest.mark.clients

PROGRAM = "opencode/node_modules/opencode-*/bin/opencode"
CONTENT = 'salut é🙂 "quoted"\n'
PROVIDERS = ["@ai-sdk/openai-compatible", "@ai-sdk/anthropic"]


def script(file: Path) -> list[dict[str, Any]]:
    """What the model answers: it writes the file slowly, reads it, and says what it has read."""
    written = f"I write the file.\n{tool_call('write', filePath=str(file), content=CONTENT)}"
    return [
        {
            "match": "^.?Create hello.txt",
            "text": f"<think>A tool can do it.</think>{written}",
            "directives": "!every=0.05",
        },
        {"match": "Wrote file successfully", "text": tool_call("read", filePath=str(file))},
        {"match": "salut é🙂", "text": "The file says salut."},
        {"text": "A greeting"},
    ]


@contextmanager
def killing_a_worker(stack: Stack) -> Iterator[None]:
    """Kill the worker while the model writes the file, and start another one."""
    first = stack.start_worker()

    def writes_the_file() -> bool:
        texts = [text_of(stack, job) for job in jobs(stack) if job["status"] == "running"]
        return any("I write the" in text for text in texts)

    def kill() -> None:
        eventually(writes_the_file, "the model writes the file", 60)
        stack.stop(first, signal.SIGKILL)
        stack.spawn_worker()

    killer = threading.Thread(target=kill)
    killer.start()
    yield
    killer.join()


def configuration(stack: Stack, provider: str) -> str:
    """The configuration that scripts/launch gives to opencode, for a provider."""
    launch = opencode(Target(stack.url, stack.key, stack.model, 100_000))
    settings = json.loads(launch.environment["OPENCODE_CONFIG_CONTENT"])
    settings["provider"]["mlxq"]["npm"] = provider
    return json.dumps(settings | {"permission": {"edit": "allow", "external_directory": "allow"}})


@pytest.mark.parametrize("provider", PROVIDERS)
def test_opencode_works_with_files_while_a_worker_is_killed(tmp_path: Path, provider: str) -> None:
    program = executable(PROGRAM)
    project = tmp_path / "project"
    project.mkdir()
    file = project / "hello.txt"
    with scripted_stack(script(file), LEASE_S="1") as stack, killing_a_worker(stack):
        variables = environment(
            tmp_path / "home", stack, OPENCODE_CONFIG_CONTENT=configuration(stack, provider),
            OPENCODE_DISABLE_MODELS_FETCH="1", OPENCODE_DISABLE_AUTOUPDATE="1",
        )  # fmt: skip
        output = run([program, "run", "--format", "json", "Create hello.txt"], project, variables)
        attempts = {job["attempt"] for job in jobs(stack)}
    parts = [json.loads(line)["part"] for line in output.splitlines()]
    tools = [(part["tool"], part["state"]["status"]) for part in parts if part["type"] == "tool"]
    texts = [part["text"] for part in parts if part["type"] == "text"]
    assert tools == [("write", "completed"), ("read", "completed")]
    assert [text.strip() for text in texts] == ["I write the file.", "The file says salut."]
    assert file.read_text() == CONTENT
    assert attempts == {1, 2}


def text_of(stack: Stack, job: dict[str, Any]) -> str:
    with stack.client() as client:
        return str(client.request("GET", job["urls"]["self"]).json()["output"]["text"])


def jobs(stack: Stack) -> list[dict[str, Any]]:
    with stack.client() as client:
        listed: list[dict[str, Any]] = client.request("GET", "/v1/jobs").json()["data"]
    return listed
