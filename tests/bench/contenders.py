"""The contenders: this stack, the libraries' own servers, servers of other projects, and the bare library.

Each is started for its turn and stopped after it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import IO, Protocol

import psutil

from scripts.stack import processes
from scripts.stack.ports import free_port
from shared.settings import ROOT
from tests.bench.checkouts import Checkout
from tests.bench.endpoints import ChatCompletions, Endpoint, Own
from tests.bench.load import send
from tests.bench.peers import PEERS, Peer
from tests.bench.plans import Plan
from tests.bench.processes import NotUp, answers, poll, process, wait_for, wait_until
from tests.bench.samples import Outcome

RESTART_WITHIN_S = 120.0
_METRICS_WITHIN_S = 30.0
_GENERATED = "mlxq_worker_generated_tokens"


class Running(Protocol):
    """A contender that has been started."""

    pid: int
    """Its root process; all its other processes are descendants."""

    def run(self, plan: Plan) -> Outcome:
        """Run a plan."""
        ...


class Served:
    """A server that is measured over HTTP."""

    def __init__(self, pid: int, endpoint: Endpoint) -> None:
        self.pid = pid
        self.endpoint = endpoint

    def run(self, plan: Plan) -> Outcome:
        """Send the requests of a plan."""
        return send(self.endpoint, plan)


class OwnStack(Served):
    """This project, as `scripts/serve` runs it."""

    endpoint: Own

    def __init__(self, pid: int, endpoint: Own, data_dir: Path) -> None:
        super().__init__(pid, endpoint)
        self.data_dir = data_dir
        self._tokens = 0

    def run(self, plan: Plan) -> Outcome:
        """Send the requests of a plan."""
        outcome = super().run(plan)
        self._tokens += sum(sample.tokens for sample in outcome.samples)
        return outcome

    def restart_worker(self) -> None:
        """Stop the workers with SIGTERM, and wait until their successors are ready.

        Raises:
            NotUp: they do not start in time.
        """
        before = self.workers()
        for worker in before:
            worker.terminate()
        psutil.wait_procs(before, timeout=RESTART_WITHIN_S)
        poll(lambda: self.workers() and answers(f"{self.endpoint.url}/readyz"), "the worker is ready", RESTART_WITHIN_S)
        self._tokens = 0

    def metric(self, name: str) -> float:
        """A metric of the workers, summed, that covers everything that has been answered since they started.

        Workers publish all their metrics together, about once a second: those that count every token received so far
        are new enough.
        """
        found = poll(self._current_metrics, "the workers have published their metrics", _METRICS_WITHIN_S)
        return found[name]

    def _current_metrics(self) -> dict[str, float]:
        """Sums by name; empty while they are older than the last answer."""
        with urllib.request.urlopen(f"{self.endpoint.url}/metrics", timeout=10) as page:
            lines = page.read().decode().splitlines()
        found: defaultdict[str, float] = defaultdict(float)
        for line in lines:
            if line.startswith("mlxq_worker_"):
                name, value = re.split(r"[{ ]", line, maxsplit=1)[0], line.rsplit(" ", 1)[1]
                found[name] += float(value)
        return found if found[_GENERATED] >= self._tokens else {}

    def workers(self) -> list[psutil.Process]:
        """The worker processes."""
        return [each for each in processes.find(self.data_dir) if "worker.app" in " ".join(each.cmdline())]


class Bare:
    """mlx-lm's BatchGenerator in its own process, which reads plans from its standard input."""

    def __init__(self, pid: int, plans: IO[str], outcomes: IO[str]) -> None:
        self.pid = pid
        self._plans = plans
        self._outcomes = outcomes

    def run(self, plan: Plan) -> Outcome:
        """Send it a plan and read the outcome."""
        self._plans.write(json.dumps(asdict(plan)) + "\n")
        self._plans.flush()
        if not (outcome := self._outcomes.readline()):
            raise NotUp("the library's process ended")
        return Outcome.from_json(json.loads(outcome))


@contextmanager
def own_stack(
    model: Path, slots: int, *, always_jobs: bool = False, checkout: Checkout | None = None, **variables: str
) -> Iterator[OwnStack]:
    """This stack, started by `scripts/serve` with its own data folder.

    Args:
        slots: the concurrency limit.
        always_jobs: whether every request is submitted as a job.
        checkout: another checkout than the present one.
        variables: environment variables.
    """
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
        # Not /readyz: programs that start later would disturb the first measurement.
        wait_until(lambda: " is ready" in (home / "log").read_text(errors="replace"), child, home / "log")
        found = re.search(r"^MLXQ_API_KEY=(\S+)", (home / "env").read_text(), re.MULTILINE)
        if found is None:
            raise NotUp("scripts/serve wrote no API key")
        yield OwnStack(child.pid, Own(url, {"X-API-Key": found[1]}, always_jobs), home / "data")


def own_stack_jobs(model: Path, slots: int) -> AbstractContextManager[OwnStack]:
    """The same, with every request submitted as a job whose stream is read then."""
    return own_stack(model, slots, always_jobs=True)


@contextmanager
def own_stack_chat(model: Path, slots: int) -> Iterator[Served]:
    """The same through `/v1/chat/completions`."""
    with own_stack(model, slots) as stack:
        yield Served(stack.pid, ChatCompletions(stack.endpoint.url, headers=stack.endpoint.headers))


@contextmanager
def mlx_lm_server(model: Path, slots: int, extra: tuple[str, ...] = ()) -> Iterator[Served]:
    """mlx-lm's own server with our BLAS and otherwise its defaults (32 rows, eight prompts at a time)."""
    del slots
    options = ["--model", str(model), "--log-level", "WARNING", *extra]
    with _library_server(sys.executable, "mlx_lm.server", options, "/v1/models") as (pid, url):
        yield Served(pid, ChatCompletions(url))


def mlx_lm_server_wide(model: Path, slots: int) -> AbstractContextManager[Served]:
    """The same with our concurrency limit."""
    return mlx_lm_server(model, slots, ("--decode-concurrency", str(slots)))


@contextmanager
def mlx_vlm_server(model: Path, slots: int) -> Iterator[Served]:
    """mlx-vlm's own server with our BLAS and otherwise its defaults (as many rows as there are requests)."""
    del slots
    options = ["--model", str(model), "--host", "127.0.0.1", "--log-level", "WARNING"]
    with _library_server(vlm_python(), "mlx_vlm.server", options, "/health") as (pid, url):
        yield Served(pid, ChatCompletions(url, model=str(model)))


def peer_server(peer: Peer) -> Callable[[Path, int], AbstractContextManager[Served]]:
    """Another project's server with our BLAS, batching, and otherwise its defaults."""

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
        # Its own home folder: some servers store prefixes there, which a later turn would find.
        env = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HOME": folder, **more}
        child = exits.enter_context(process(command, log, env))
        wait_for(f"http://127.0.0.1:{port}{health}", child, log)
        yield child.pid, f"http://127.0.0.1:{port}"


@contextmanager
def bare(model: Path, slots: int) -> Iterator[Bare]:
    """The upper limit: the library alone, without a server."""
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
            child.terminate()  # it may still run a plan that was interrupted


def vlm_python() -> str:
    """The Python interpreter that has mlx-vlm: MLX_VLM_PYTHON, or this one."""
    return os.environ.get("MLX_VLM_PYTHON", sys.executable)


def _without_vlm() -> str:
    if "MLX_VLM_PYTHON" in os.environ or importlib.util.find_spec("mlx_vlm"):
        return ""
    return "mlx-vlm is not installed; set MLX_VLM_PYTHON to the Python of an environment that has it"


@dataclass(frozen=True, slots=True)
class Contender:
    """A server or library that is measured.

    Attributes:
        scenarios: those it takes part in; None: all.
        missing: why it cannot be measured here; empty if it can.
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
        Contender(f"{OWN}-chat", own_stack_chat, ("closed",)),
        Contender(PEER, mlx_lm_server),
        Contender(f"{PEER}-wide", mlx_lm_server_wide, ("closed",)),
        Contender("mlx_vlm.server", mlx_vlm_server, missing=_without_vlm),
        *(Contender(each.name, peer_server(each), ("single", "closed"), each.missing) for each in PEERS.values()),
        Contender(BARE, bare),
    )
}
