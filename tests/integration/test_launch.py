"""scripts/launch prints what starts an agent with the running service, and starts it."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest

from scripts.client import launch
from tests.plugins.web_stack import MODEL, StubWorker, WebStack

AGENT = '#!/bin/sh\nenv > "$REPORT"; printf "%s\\n" "$0" "$@" >> "$REPORT"; exit 7\n'


@pytest.fixture
def service(web: WebStack, monkeypatch: pytest.MonkeyPatch) -> WebStack:
    """A service that the settings name."""
    worker = StubWorker(web.redis_url)
    worker.announce()
    monkeypatch.setenv("PORT", web.url.rpartition(":")[2])
    monkeypatch.setenv("MLXQ_API_KEY", web.key)
    return web


def exports(output: str) -> tuple[dict[str, str], list[str]]:
    """The variables that the printed commands set, and the last command."""
    *lines, command = map(shlex.split, output.splitlines())
    assert all(line[0] == "export" and len(line) == 2 for line in lines)
    pairs = (line[1].partition("=") for line in lines)
    return {name: value for name, _, value in pairs}, command


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[dict[str, str], list[str]]:
    assert launch.main([*arguments]) == 0
    return exports(capsys.readouterr().out)


def test_claude(service: WebStack, capsys: pytest.CaptureFixture[str]) -> None:
    variables, command = printed(capsys, "claude", "--print", "hi there")
    assert command == ["claude", "--model", MODEL, "--print", "hi there"]
    assert variables["ANTHROPIC_BASE_URL"] == service.url
    assert variables["ANTHROPIC_AUTH_TOKEN"] == service.key
    assert {value for name, value in variables.items() if name.endswith("_MODEL")} == {MODEL}


def test_aider(service: WebStack, capsys: pytest.CaptureFixture[str]) -> None:
    variables, command = printed(capsys, "aider")
    assert variables == {"OPENAI_API_BASE": f"{service.url}/v1", "OPENAI_API_KEY": service.key}
    assert command[:3] == ["aider", "--model", f"openai/{MODEL}"]


def test_codex(service: WebStack, capsys: pytest.CaptureFixture[str]) -> None:
    variables, command = printed(capsys, "codex", "exec", "hi")
    assert variables == {"MLXQ_API_KEY": service.key}
    assert (command[0], command[-4:]) == ("codex", ["-m", MODEL, "exec", "hi"])
    settings = tomllib.loads("\n".join(command[2:-4:2]))
    expected = {"name": "mlxq", "base_url": f"{service.url}/v1", "env_key": "MLXQ_API_KEY", "wire_api": "responses"}
    assert settings["model_providers"] == {"mlxq": expected}
    assert settings["model_provider"] == "mlxq"
    assert (settings["web_search"], settings["features"]) == ("disabled", {"multi_agent": False})
    assert settings["model_context_window"] > 0


def test_opencode(service: WebStack, capsys: pytest.CaptureFixture[str]) -> None:
    variables, command = printed(capsys, "opencode", "--model", MODEL)
    configuration = json.loads(variables["OPENCODE_CONFIG_CONTENT"])
    provider = configuration["provider"]["mlxq"]
    assert command == ["opencode"]
    assert configuration["model"] == f"mlxq/{MODEL}"
    assert provider["options"] == {"baseURL": f"{service.url}/v1", "apiKey": "{env:MLXQ_API_KEY}"}
    assert provider["models"][MODEL]["limit"]["context"] > 0
    assert variables["MLXQ_API_KEY"] == service.key


def test_run_becomes_the_agent(service: WebStack, tmp_path: Path) -> None:
    (tmp_path / "aider").write_text(AGENT)
    (tmp_path / "aider").chmod(0o755)
    report, home = tmp_path / "report", tmp_path / "home"
    home.mkdir()
    variables = {
        **os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "REPORT": str(report), "HOME": str(home),
        "HF_HOME": "kept",
    }  # fmt: skip
    ended = subprocess.run(
        [Path("scripts/launch").absolute(), "aider", "--run", "--message", "hi"],
        env=variables, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (ended.returncode, ended.stdout, ended.stderr) == (7, "", "")
    lines = report.read_text().splitlines()
    assert lines[-6:] == [
        str(tmp_path / "aider"),
        "--model",
        f"openai/{MODEL}",
        "--no-show-model-warnings",
        "--message",
        "hi",
    ]
    assert {f"OPENAI_API_KEY={service.key}", "HF_HOME=kept"} <= set(lines)
    assert list(home.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["claude", "--model", "other"], "the service has no model other; it has stub"),
        (["claude", "--url", "http://127.0.0.1:1"], "127.0.0.1:1"),
        (["claude", "--api-key-env", "NOTHING"], "no API key"),
        (["opencode", "--run"], "npm install -g opencode-ai"),
    ],
)
def test_what_is_missing_is_named(
    service: WebStack,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert launch.main(arguments) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("launch: ")
    assert message in output.err
    assert output.err.count("\n") == 1
