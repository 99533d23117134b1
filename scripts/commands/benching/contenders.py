"""Who is measured: this stack, mlx_lm.server, and the bare library. Each is started for its turn and ended after it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from scripts.commands.benching.load import Burst, Endpoint, burst
from scripts.commands.ports import free_port
from shared.settings import ROOT

START_WITHIN_S = 180


@contextmanager
def process(command: list[str], log: Path, env: dict[str, str] | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """A child in a group of its own, ended with SIGTERM, and SIGKILL after a while."""
    with log.open("wb") as out:
        child = subprocess.Popen(
            command, stdout=out, stderr=out, cwd=ROOT, env={**os.environ, **(env or {})}, start_new_session=True
        )
        try:
            yield child
        finally:
            child.terminate()
            try:
                child.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()


def wait_for(url: str, child: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until `url` answers 200.

    Raises:
        RuntimeError: the process ended, or it took too long; with the tail of its log.
    """
    end = time.monotonic() + START_WITHIN_S
    while time.monotonic() < end and child.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise RuntimeError(f"{url} did not come up:\n" + log.read_text(errors="replace")[-2000:])


@dataclass(frozen=True)
class Inference:
    """Our own `POST /inference` as a stream."""

    url: str
    headers: dict[str, str]

    def body(self, messages: list[dict[str, str]], max_tokens: int) -> dict[str, Any]:
        """The request, greedy."""
        return {"messages": messages, "max_tokens": max_tokens, "temperature": 0, "stream": True}

    def chunk(self, event: dict[str, Any]) -> bool:
        """Whether an event carries text."""
        return "text" in event

    def tokens(self, event: dict[str, Any]) -> int | None:
        """The usage count, when the event has it."""
        return event["usage"]["completion_tokens"] if event.get("usage") else None


@dataclass(frozen=True)
class ChatCompletions:
    """OpenAI's chat completions, as mlx_lm.server serves them."""

    url: str
    headers: dict[str, str]

    def body(self, messages: list[dict[str, str]], max_tokens: int) -> dict[str, Any]:
        """The request, greedy."""
        return {
            "messages": messages,
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }

    def chunk(self, event: dict[str, Any]) -> bool:
        """Whether an event carries text."""
        return bool(event.get("choices")) and bool(event["choices"][0]["delta"].get("content"))

    def tokens(self, event: dict[str, Any]) -> int | None:
        """The usage count, when the event has it."""
        return event["usage"]["completion_tokens"] if event.get("usage") else None


class Served:
    """A contender behind HTTP."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self._sent = 0

    def run(self, clients: int, max_tokens: int) -> Burst:
        """One burst of prompts that it has not seen."""
        result = burst(self.endpoint, clients, max_tokens, self._sent)
        self._sent += clients
        return result


@contextmanager
def stack(model: Path, slots: int) -> Iterator[Served]:
    """This project, as `scripts/serve` starts it, in a folder of its own."""
    with tempfile.TemporaryDirectory(prefix="mlxq-bench-") as folder, ExitStack() as exits:
        home, port = Path(folder), free_port()
        env = {
            "ENV_FILE": str(home / "env"),
            "DATA_DIR": str(home / "data"),
            "MODEL_PATH": str(model),
            "PORT": str(port),
            "FLOWER_PORT": str(free_port()),
            "SLOTS": str(slots),
            "RATE_LIMIT": "1000000/minute",
        }
        child = exits.enter_context(process([str(ROOT / "scripts/serve")], home / "log", env))
        wait_for(f"http://127.0.0.1:{port}/readyz", child, home / "log")
        found = re.search(r"^MLXQ_API_KEY=(\S+)", (home / "env").read_text(), re.MULTILINE)
        if found is None:
            raise RuntimeError("scripts/serve wrote no API key")
        yield Served(Inference(f"http://127.0.0.1:{port}/inference", {"X-API-Key": found[1]}))


@contextmanager
def mlx_lm_server(model: Path, slots: int, extra: list[str] | None = None) -> Iterator[Served]:
    """mlx-lm's own server with the same BLAS as ours, otherwise as it comes (32 rows, prompts eight at a time)."""
    del slots
    with tempfile.TemporaryDirectory(prefix="mlxq-bench-") as folder, ExitStack() as exits:
        log, port = Path(folder) / "log", free_port()
        start = "from shared.blas import prefer_openblas; prefer_openblas(); from mlx_lm.server import main; main()"
        command = [sys.executable, "-c", start, "--model", str(model), "--port", str(port), "--log-level", "WARNING"]
        command += extra or []
        child = exits.enter_context(process(command, log, {"PYTHONPATH": str(ROOT)}))
        wait_for(f"http://127.0.0.1:{port}/v1/models", child, log)
        yield Served(ChatCompletions(f"http://127.0.0.1:{port}/v1/chat/completions", {}))


def mlx_lm_server_wide(model: Path, slots: int) -> AbstractContextManager[Served]:
    """The same with as many rows as ours."""
    return mlx_lm_server(model, slots, ["--decode-concurrency", str(slots)])


class Bare:
    """mlx-lm's BatchGenerator in a process of its own, asked over its standard input."""

    def __init__(self, questions: IO[str], answers: IO[str]) -> None:
        self._questions = questions
        self._answers = answers

    def run(self, clients: int, max_tokens: int) -> Burst:
        """One burst."""
        self._questions.write(json.dumps({"clients": clients, "max_tokens": max_tokens}) + "\n")
        self._questions.flush()
        return Burst(**json.loads(self._answers.readline()))


@contextmanager
def bare(model: Path, slots: int) -> Iterator[Bare]:
    """The limit: the library alone, nobody served."""
    command = [sys.executable, "-m", "scripts.commands.benching.bare", str(model), str(slots)]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as child:
        if child.stdin is None or child.stdout is None:
            raise RuntimeError("no pipes to the process")
        with child.stdin:
            yield Bare(child.stdin, child.stdout)


class Contender(Protocol):
    """Something that answers bursts."""

    def run(self, clients: int, max_tokens: int) -> Burst:
        """One burst of `clients` requests."""
        ...


CONTENDERS: dict[str, Callable[[Path, int], AbstractContextManager[Contender]]] = {
    "mlxq": stack,
    "mlx_lm.server": mlx_lm_server,
    "mlx_lm.server, same slots": mlx_lm_server_wide,
    "BatchGenerator alone": bare,
}
