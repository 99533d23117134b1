"""Agents on /v1/responses, Codex and OpenAI's Agents SDK: they write a file and read it, while a worker is killed."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from scripts.client.launch import Target, codex
from tests.plugins.stack import Stack
from tests.support.clients import (
    PROGRAMS,
    environment,
    executable,
    jobs,
    killing_a_worker,
    run,
    scripted_stack,
    tool_call,
)

pytestmark = pytest.mark.clients

CODEX = "codex/node_modules/@openai/codex-*/vendor/*/bin/codex"
CONTENT = 'salut é🙂 "quoted"\n'
WRITING, DONE = "I write the file.", "The file says salut."
SLOW = "!every=0.05"
PATCH = f"*** Begin Patch\n*** Add File: hello.txt\n+{CONTENT}*** End Patch\n"


def command(stack: Stack, *options: str) -> list[str | Path]:
    """The command that scripts/launch gives for Codex, without its sandbox: in containers, it fails with status 0."""
    launch = codex(Target(stack.url, stack.key, stack.model, 100_000))
    run_once = ("exec", "--json", "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox")
    return [executable(CODEX), *run_once, *launch.command[1:], *options, "Create hello.txt"]


def catalog(folder: Path, stack: Stack) -> Path:
    """A description of the model for Codex, because of which it offers `apply_patch` with a grammar."""
    model = {
        "slug": stack.model, "display_name": stack.model, "base_instructions": "Use the tools.", "priority": 1,
        "supported_reasoning_levels": [], "shell_type": "unified_exec", "visibility": "list", "supported_in_api": True,
        "apply_patch_tool_type": "freeform", "truncation_policy": {"mode": "tokens", "limit": 10_000},
        "context_window": 100_000, "supports_parallel_tool_calls": True, "support_verbosity": False,
        "experimental_supported_tools": [],
    }  # fmt: skip
    path = folder / "models.json"
    path.write_text(json.dumps({"models": [model]}))
    return path


def items(output: str, kind: str) -> list[dict[str, Any]]:
    """The completed items of a kind that Codex reports."""
    events = [json.loads(line) for line in output.splitlines()]
    done = [event["item"] for event in events if event["type"] == "item.completed"]
    return [item for item in done if item["type"] == kind]


def test_codex_works_with_commands_while_a_worker_is_killed(tmp_path: Path) -> None:
    executable(CODEX)
    project = tmp_path / "project"
    project.mkdir()
    write = tool_call("exec_command", cmd=f"printf %s {shlex.quote(CONTENT)} > hello.txt; echo written")
    script: list[dict[str, Any]] = [
        {"match": "Create hello.txt", "text": f"<think>A command.</think>{WRITING}\n{write}", "directives": SLOW},
        {"match": "written", "text": tool_call("exec_command", cmd="cat hello.txt")},
        {"match": "salut é🙂", "text": DONE},
    ]
    with scripted_stack(script, LEASE_S="1") as stack, killing_a_worker(stack, WRITING[:7]):
        output = run(command(stack), project, environment(tmp_path / "home", stack))
        attempts = {job["attempt"] for job in jobs(stack)}
    assert [item["exit_code"] for item in items(output, "command_execution")] == [0, 0]
    assert [item["text"].strip() for item in items(output, "agent_message")] == [WRITING, DONE]
    assert (project / "hello.txt").read_text() == CONTENT
    assert attempts == {1, 2}


def test_codex_patches_a_file_with_a_custom_tool_while_a_worker_is_killed(tmp_path: Path) -> None:
    executable(CODEX)
    project = tmp_path / "project"
    project.mkdir()
    patch = tool_call("apply_patch", input=PATCH)
    script: list[dict[str, Any]] = [
        {"structured": True},
        {"match": "Create hello.txt", "text": f"{WRITING}\n{patch}", "directives": SLOW},
        {"match": "Success. Updated", "text": tool_call("exec_command", cmd="cat hello.txt")},
        {"match": "salut é🙂", "text": DONE},
    ]
    with scripted_stack(script, LEASE_S="1") as stack, killing_a_worker(stack, WRITING[:7]):
        described = f"model_catalog_json={json.dumps(str(catalog(tmp_path, stack)))}"
        output = run(command(stack, "-c", described), project, environment(tmp_path / "home", stack))
        attempts = {job["attempt"] for job in jobs(stack)}
    assert [item["status"] for item in items(output, "file_change")] == ["completed"]
    assert [item["text"].strip() for item in items(output, "agent_message")] == [WRITING, DONE]
    assert (project / "hello.txt").read_text() == CONTENT
    assert attempts == {1, 2}


def test_the_agents_sdk_writes_a_file_while_a_worker_is_killed(tmp_path: Path) -> None:
    python = executable("agents/bin/python")
    project = tmp_path / "project"
    project.mkdir()
    write = tool_call("write_file", name="hello.txt", content=CONTENT)
    script: list[dict[str, Any]] = [
        {"structured": True},
        {"match": "Create hello.txt", "text": f"{WRITING}\n{write}", "directives": SLOW},
        {"match": "^wrote hello.txt", "text": tool_call("read_file", name="hello.txt")},
        {"match": "salut é🙂", "text": DONE},
        {"match": "^person as JSON", "text": json.dumps({"name": "Ada é", "age": 36})},
    ]
    with scripted_stack(script, LEASE_S="1") as stack, killing_a_worker(stack, WRITING[:7]):
        run([python, PROGRAMS / "use_openai_agents.py"], project, environment(tmp_path / "home", stack))
        attempts = {job["attempt"] for job in jobs(stack)}
    assert (project / "hello.txt").read_text() == CONTENT
    assert attempts == {1, 2}
