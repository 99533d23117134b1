"""Who is measured: this stack, the libraries' own servers, and the bare library.

Each is started for its turn and ended after it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import IO, Protocol

import psutil

from scripts.stack import leftovers
from scripts.stack.ports import free_port
from shared.settings import ROOT
from tests.bench.checkouts import Checkout
from tests.bench.endpoints import ChatCompletions, Endpoint, Own
from tests.bench.load import send
from tests.bench.peers import PEERS, Peer
from tests.bench.plans import Plan
from tests.bench.processes import NotUp, answers, process, wait_for, wait_until
from tests.bench.samples import Outcome

RESTART_WITHIN_S = 120.0
_TOLD_S = 2.5
"""Gauges are read once a second, and told with the next renewal of a lease."""


class Running(Protocol):
    """A contender that has been started."""

    pid: int
    """Of the process that all its others descend from."""

    def run(self, plan: Plan) -> Outcome:
        """Do a plan."""
        ...


class Served:
    """A server, asked over HTTP."""

    def __init__(self, pid: int, endpoint: Endpoint) -> None:
        self.pid = pid
        self.endpoint = endpoint

    def run(self, plan: Plan) -> Outcome:
        """Send its requests."""
        return send(self.endpoint, plan)


class OwnStack(Served):
    """This project, as `scripts/serve` runs it."""

    endpoint: Own

    def __init__(self, pid: int, endpoint: Own, data_dir: Path) -> None:
        super().__init__(pid, endpoint)
        self.data_dir = data_dir

    def restart_worker(self) -> None:
        """End the workers in an orderly way, and wait until their successors are ready.

        Raises:
            NotUp: they do not come back.
        """
        before = self.workers()
        for worker in before:
            worker.terminate()
        psutil.wait_procs(before, timeout=RESTART_WITHIN_S)
        end = time.monotonic() + RESTART_WITHIN_S
        while not (self.workers() and answers(f"{self.endpoint.url}/readyz")):
            if time.monotonic() > end:
                raise NotUp("the worker did not come back")
            time.sleep(0.1)

    def metric(self, name: str) -> float:
        """A number that the workers tell once a second, added up over them, as /metrics has it a moment later."""
        time.sleep(_TOLD_S)
        with urllib.request.urlopen(f"{self.endpoint.url}/metrics", timeout=10) as page:
            lines = page.read().decode().splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((f"{name}{{", f"{name} ")))

    def workers(self) -> list[psutil.Process]:
        """The processes that hold the model."""
        return [each for each in leftovers.find(self.data_dir) if "worker.app" in " ".join(each.cmdline())]


class Bare:
    """mlx-lm's BatchGenerator in a process of its own, asked over its standard input."""

    def __init__(self, pid: int, questions: IO[str], answers: IO[str]) -> None:
        self.pid = pid
        self._questions = questions
        self._answers = answers

    def run(self, plan: Plan) -> Outcome:
        """Hand it in and read what it gave."""
        self._questions.write(json.dumps(asdict(plan)) + "\n")
        self._questions.flush()
        if not (answer := self._answers.readline()):
            raise NotUp("the library's process ended")
        return Outcome.from_json(json.loads(answer))


@contextmanager
def own_stack(
    model: Path, slots: int, *, always_jobs: bool = False, checkout: Checkout | None = None, **variables: str
) -> Iterator[OwnStack]:
    """This project, as `scripts/serve` starts it, in a folder of its own; perhaps another checkout of it."""
    source = checkout or Checkout()
    with tempfile.TemporaryDirectory(prefix="mlxq-bench-") as folder, ExitStack() as exits:
        home, port = Path(folder), free_port()
        env = source.environment(
            ENV_FILE=str(home / "env"),
            DATA_DIR=str(home / "data"),
            MODEL_PATH=str(model),
            PORT=str(port),
            FLOWER_PORT=str(free_port()),
            SLOTS=str(slots),
            RATE_LIMIT="1000000/minute",
            **variables,
        )
        child = exits.enter_context(process(source.serve, home / "log", env, source.root))
        url = f"http://127.0.0.1:{port}"
        # Not /readyz: what it starts last would take its time from the first measurement.
        wait_until(lambda: " is ready" in (home / "log").read_text(errors="replace"), child, home / "log")
        found = re.search(r"^MLXQ_API_KEY=(\S+)", (home / "env").read_text(), re.MULTILINE)
        if found is None:
            raise NotUp("scripts/serve wrote no API key")
        yield OwnStack(child.pid, Own(url, {"X-API-Key": found[1]}, always_jobs), home / "data")


def own_stack_jobs(model: Path, slots: int) -> AbstractContextManager[OwnStack]:
    """The same, with every request as a job that is submitted first and read then."""
    return own_stack(model, slots, always_jobs=True)


@contextmanager
def mlx_lm_server(model: Path, slots: int, extra: tuple[str, ...] = ()) -> Iterator[Served]:
    """mlx-lm's own server with the same BLAS as ours, otherwise as it comes (32 rows, prompts eight at a time)."""
    del slots
    options = ["--model", str(model), "--log-level", "WARNING", *extra]
    with _library_server(sys.executable, "mlx_lm.server", options, "/v1/models") as (pid, url):
        yield Served(pid, ChatCompletions(url))


def mlx_lm_server_wide(model: Path, slots: int) -> AbstractContextManager[Served]:
    """The same with as many rows as ours."""
    return mlx_lm_server(model, slots, ("--decode-concurrency", str(slots)))


@contextmanager
def mlx_vlm_server(model: Path, slots: int) -> Iterator[Served]:
    """mlx-vlm's own server with the same BLAS as ours, otherwise as it comes (as many rows as there are requests)."""
    del slots
    options = ["--model", str(model), "--host", "127.0.0.1", "--log-level", "WARNING"]
    with _library_server(vlm_python(), "mlx_vlm.server", options, "/health") as (pid, url):
        yield Served(pid, ChatCompletions(url, model=str(model)))


def peer_server(peer: Peer) -> Callable[[Path, int], AbstractContextManager[Served]]:
    """Another project's server with the same BLAS as ours and batches, otherwise as it comes."""

    @contextmanager
    def start(model: Path, slots: int) -> Iterator[Served]:
        del slots
        options = ["serve", str(model), "--host", "127.0.0.1", *peer.options]
        more = dict(peer.environment)
        with _library_server(str(peer.python), peer.module, options, "/health", more) as (pid, url):
            yield Served(pid, ChatCompletions(url, model=str(model)))

    return start


@contextmanager
def _library_server(
    python: str, module: str, options: list[str], health: str, more: Mapping[str, str] = MappingProxyType({})
) -> Iterator[tuple[int, str]]:
    with tempfile.TemporaryDirectory(prefix="mlxq-bench-", ignore_cleanup_errors=True) as folder, ExitStack() as exits:
        log, port = Path(folder) / "log", free_port()
        start = f"from shared.blas import prefer_openblas; prefer_openblas(); from {module} import main; main()"
        command = [python, "-c", start, *options, "--port", str(port)]
        # A home of its own: some keep prefixes there, which a later turn would find.
        env = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HOME": folder, **more}
        child = exits.enter_context(process(command, log, env))
        wait_for(f"http://127.0.0.1:{port}{health}", child, log)
        yield child.pid, f"http://127.0.0.1:{port}"


@contextmanager
def bare(model: Path, slots: int) -> Iterator[Bare]:
    """The limit: the library alone, nobody served."""
    command = [sys.executable, "-m", "tests.bench.bare", str(model), str(slots)]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as child:
        if child.stdin is None or child.stdout is None:
            raise NotUp("no pipes to the process")
        try:
            if not child.stdout.readline():
                raise NotUp("the library's process did not start")
            yield Bare(child.pid, child.stdin, child.stdout)
        finally:
            child.terminate()  # it may be in the midst of a plan that nobody waits for any more


def vlm_python() -> str:
    """The interpreter that has mlx-vlm: MLX_VLM_PYTHON, or this one."""
    return os.environ.get("MLX_VLM_PYTHON", sys.executable)


def _without_vlm() -> str:
    if "MLX_VLM_PYTHON" in os.environ or importlib.util.find_spec("mlx_vlm"):
        return ""
    return "mlx-vlm is not installed; MLX_VLM_PYTHON=/path/to/python names an environment that has it"


@dataclass(frozen=True, slots=True)
class Contender:
    """Somebody to be measured.

    Attributes:
        scenarios: those it takes part in; None: all.
        missing: why it cannot take part here; empty when it can.
    """

    name: str
    start: Callable[[Path, int], AbstractContextManager[Running]]
    scenarios: tuple[str, ...] | None = None
    missing: Callable[[], str] = str


OWN = "mlxq"
PEER = "mlx_lm.server"
BARE = "BatchGenerator"

CONTENDERS = {
    each.name: each
    for each in (
        Contender(OWN, own_stack),
        Contender(f"{OWN}-jobs", own_stack_jobs, ("closed",)),
        Contender(PEER, mlx_lm_server),
        Contender(f"{PEER}-wide", mlx_lm_server_wide, ("closed",)),
        Contender("mlx_vlm.server", mlx_vlm_server, missing=_without_vlm),
        *(Contender(each.name, peer_server(each), ("single", "closed"), each.missing) for each in PEERS.values()),
        Contender(BARE, bare),
    )
}
