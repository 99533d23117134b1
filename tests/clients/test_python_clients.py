"""Programs in Python that speak to the OpenAI and the Anthropic API, with a model that answers from a script."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.plugins.stack import Stack
from tests.support.clients import PROGRAMS, environment, executable, run, scripted_stack, tool_call

pytestmark = pytest.mark.clients

PERSON = {"name": "Ada é", "age": 36}
JOKE = {"setup": "Why do cats purr?", "punchline": "Because they can."}
FILE = "print('salut é🙂')\n"
SCRIPT = (
    {"structured": True},
    {"match": "^add", "text": f"<think>A tool adds.</think>{tool_call('add', a=1)}"},
    {"match": "^sum: 3", "text": "The sum is 3."},
    {"match": "^person by a tool", "text": tool_call("Person", **PERSON)},
    {"match": "^person as JSON", "text": json.dumps(PERSON)},
    {"match": "salut.py", "text": f"I write the file.\n\nsalut.py\n```\n{FILE}```\n"},
    {"match": r"magic_function\(3\)|^Hello!$", "text": tool_call("magic_function", input=3)},
    {"match": "magic_function_no_args", "text": tool_call("magic_function_no_args")},
    {"match": "Pirate greeting", "text": tool_call("greeting_generator", answer_style="Pirate")},
    {"match": "weather in San Francisco", "text": tool_call("get_weather", location="San Francisco")},
    {
        "match": "你好啊集团",
        "text": tool_call("unicode_customer", customer_name="你好啊集团", description="technology"),
    },
    {
        "match": "こんにちは",
        "text": tool_call("unicode_customer", customer_name="こんにちは株式会社", description="it"),
    },
    {"match": "joke about cats", "text": json.dumps(JOKE)},
    {"text": "Hello é🙂"},
)
JOKE_BY_A_TOOL = ({"structured": True}, {"text": tool_call("Joke", **JOKE)})
PYTHON = "clients/bin/python"
BY_A_TOOL = "pydantic_2_v1"
"""The test whose schema LangChain's client only sends as a tool. It asks for the same joke as others."""


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with scripted_stack(SCRIPT) as stack:
        stack.start_worker()
        yield stack


@pytest.mark.parametrize(
    ("python", "program"),
    [(PYTHON, "use_litellm"), (PYTHON, "use_instructor"), ("pydantic-ai/bin/python", "use_pydantic_ai")],
)
def test_a_program(stack: Stack, tmp_path: Path, python: str, program: str) -> None:
    run([executable(python), PROGRAMS / f"{program}.py"], tmp_path, environment(tmp_path / "home", stack))


def test_llm(stack: Stack, tmp_path: Path) -> None:
    """Its configuration is two files in a folder, as docs/integrations/clients.md says."""
    python, home = executable(PYTHON), tmp_path / "llm"
    home.mkdir()
    model = {"model_id": "local", "model_name": stack.model, "api_base": f"{stack.url}/v1", "api_key_name": "mlxq"}
    (home / "extra-openai-models.yaml").write_text(json.dumps([model | {"supports_tools": True}]))
    (home / "keys.json").write_text(json.dumps({"mlxq": stack.key}))
    variables = environment(tmp_path / "home", stack, LLM_USER_PATH=str(home))
    for options in ([], ["--no-stream"]):
        command = [python.with_name("llm"), "-m", "local", "hello", *options]
        assert run(command, tmp_path, variables).strip() == "Hello é🙂"


def run_langchain_tests(stack: Stack, folder: Path, method: str, selection: str) -> None:
    # In this folder, pytest would also load the conftest.py of the service's tests.
    suite = shutil.copy(PROGRAMS / "langchain_suite.py", folder / "test_langchain.py")
    options = ("asyncio_mode=auto", "asyncio_default_fixture_loop_scope=function")
    command: list[Any] = [
        executable(PYTHON), "-m", "pytest", suite, "-q", "-c", "/dev/null", "--rootdir", folder,
        *(part for option in options for part in ("-o", option)), "--benchmark-disable", "-k", selection,
    ]  # fmt: skip
    variables = environment(folder / "home", stack, STRUCTURED_OUTPUT_METHOD=method)
    print(run(command, folder, variables, within_s=300))


def test_the_standard_tests_of_langchain(stack: Stack, tmp_path: Path) -> None:
    run_langchain_tests(stack, tmp_path, "json_schema", f"not {BY_A_TOOL}")


def test_the_standard_test_of_langchain_for_older_pydantic(tmp_path: Path) -> None:
    with scripted_stack(JOKE_BY_A_TOOL) as stack:
        stack.start_worker()
        run_langchain_tests(stack, tmp_path, "function_calling", BY_A_TOOL)


def test_aider_writes_a_file(stack: Stack, tmp_path: Path) -> None:
    project = tmp_path / "project"
    project.mkdir()
    api = {"OPENAI_API_BASE": f"{stack.url}/v1", "OPENAI_API_KEY": stack.key}
    variables = environment(tmp_path / "home", stack, **api, LITELLM_LOCAL_MODEL_COST_MAP="True")
    command: list[Any] = [
        executable("aider/bin/aider"), "--model", f"openai/{stack.model}", "--edit-format", "whole", "--yes-always",
        "--no-git", "--no-show-model-warnings", "--no-check-update", "--analytics-disable", "--no-pretty",
        "--message", "Write salut.py",
    ]  # fmt: skip
    run(command, project, variables)
    assert (project / "salut.py").read_text() == FILE
