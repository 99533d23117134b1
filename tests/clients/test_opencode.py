"""opencode with its own tools: it creates a file, reads it and finishes, while a worker is killed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from scripts.client.launch import Target, opencode
from tests.plugins.stack import Stack
from tests.support.clients import environment, executable, jobs, killing_a_worker, run, scripted_stack, tool_call

pytestmark = pytest.mark.clients

PROGRAM = "opencode/node_modules/opencode-*/bin/opencode"
CONTENT = 'salut é🙂 "quoted"\n'
WRITING = "I write the file."
PROVIDERS = ["@ai-sdk/openai-compatible", "@ai-sdk/anthropic"]


def script(file: Path) -> list[dict[str, Any]]:
    """What the model answers: it writes the file slowly, reads it, and says what it has read."""
    written = f"{WRITING}\n{tool_call('write', filePath=str(file), content=CONTENT)}"
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
    with scripted_stack(script(file), LEASE_S="1") as stack, killing_a_worker(stack, WRITING):
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
    assert [text.strip() for text in texts] == [WRITING, "The file says salut."]
    assert file.read_text() == CONTENT
    assert attempts == {1, 2}
