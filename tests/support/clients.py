"""Programs that people use with the service: where scripts/test-clients installs them, and how tests run them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pytest

from shared.settings import ROOT
from tests.plugins.stack import Stack, made_stack
from tests.support.waiting import eventually

INSTALLED: Final = ROOT / ".venv-clients"
PROGRAMS: Final = ROOT / "tests/clients/programs"
_NO_PROXY: Final = "http://127.0.0.1:9"
"""A proxy that does not answer: a program must reach nothing but this machine."""


def tool_call(name: str, /, **arguments: Any) -> str:
    """A call as a scripted model writes it."""
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


@contextmanager
def scripted_stack(lines: Sequence[Mapping[str, Any]], **variables: str) -> Iterator[Stack]:
    """The API with its Redis, for a model that answers from a script. The test starts workers."""
    with tempfile.TemporaryDirectory(prefix="mlxq-") as folder:
        script = Path(folder) / "script.jsonl"
        script.write_text("\n".join(map(json.dumps, lines)))
        for stack in made_stack(Path("fake"), {"BACKEND": "scripted", "SCRIPT_FILE": str(script), **variables}):
            stack.start_web()
            yield stack


@contextmanager
def killing_a_worker(stack: Stack, text: str) -> Iterator[None]:
    """Start a worker, kill it while an answer with this text is generated, and start another one."""
    first = stack.start_worker()

    def kill() -> None:
        eventually(lambda: any(text in each for each in _running_texts(stack)), "the model writes", 240)
        stack.stop(first, signal.SIGKILL)
        stack.spawn_worker()

    killer = threading.Thread(target=kill)
    killer.start()
    yield
    killer.join()


def _running_texts(stack: Stack) -> list[str]:
    with stack.client() as client:
        paths = [job["urls"]["self"] for job in jobs(stack) if job["status"] == "running"]
        return [str(client.request("GET", path).json()["output"]["text"]) for path in paths]


def jobs(stack: Stack) -> list[dict[str, Any]]:
    """Return the newest jobs."""
    with stack.client() as client:
        listed: list[dict[str, Any]] = client.request("GET", "/v1/jobs").json()["data"]
    return listed


def executable(pattern: str) -> Path:
    """The path of an installed program: the first one below `.venv-clients` that a pattern matches."""
    paths = sorted(INSTALLED.glob(pattern))
    if not paths:
        pytest.skip(f"{INSTALLED / pattern} is not installed: use scripts/test-clients")
    return paths[0]


def environment(home: Path, stack: Stack, **variables: str) -> dict[str, str]:
    """A clean environment with an empty home, in which only this machine can be reached."""
    home.mkdir(exist_ok=True)
    proxies = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), _NO_PROXY)
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "no_proxy": "127.0.0.1",
        "NO_PROXY": "127.0.0.1",
        **proxies,
        "MLXQ_URL": stack.url,
        "MLXQ_API_KEY": stack.key,
        "MLXQ_MODEL": stack.model,
        **variables,
    }


def run(command: Sequence[str | Path], folder: Path, variables: Mapping[str, str], within_s: float = 300) -> str:
    """Run a program in a folder; return its output."""
    ended = subprocess.run(
        command, cwd=folder, env=variables, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=within_s, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, f"{ended.stdout}\n{ended.stderr}"
    return ended.stdout
