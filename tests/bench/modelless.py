"""A stack without a model: Valkey, one API process, a worker with the fake backend, and the CPU time of each.

The commands and Valkey's configuration are those of `scripts/serve`.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from scripts.stack.ports import free_port
from tests.bench.checkouts import Checkout
from tests.bench.processes import process, wait_for
from tests.bench.resources import cpu_s

KEY = "mlxq_00000000_" + "k" * 43


@dataclass(frozen=True)
class Stack:
    """The running processes, by name, and the port of the API."""

    port: int
    processes: dict[str, psutil.Process]

    def pids(self) -> dict[str, int]:
        """Their process ids."""
        return {name: each.pid for name, each in self.processes.items()}

    def cpu_s(self) -> dict[str, float]:
        """User and system time of each process and its descendants, in seconds."""
        return {name: cpu_s(each) for name, each in self.processes.items()}


@contextmanager
def modelless(*, worker: bool = True, checkout: Checkout | None = None, **variables: str) -> Iterator[Stack]:
    """Run Valkey, one API process and, by default, one worker, of this or another checkout."""
    source = checkout or Checkout()
    with tempfile.TemporaryDirectory(prefix="mlxq-bench-") as folder, ExitStack() as exits:
        port = free_port()
        env = source.environment(
            ENV_FILE=os.devnull,
            DATA_DIR=folder,
            REDIS_URL="",
            BROKER_URL="",
            BACKEND="fake",
            PORT=str(port),
            MLXQ_API_KEY=KEY,
            RATE_LIMIT="1000000/second",
            WEB_WORKERS="1",
            **variables,
        )
        commands = source.programs(env)
        wanted = ["valkey", "web", *(["worker"] if worker else [])]
        found: dict[str, psutil.Process] = {}
        for name in wanted:
            log = Path(folder) / f"{name}.log"
            child = exits.enter_context(process(commands[name], log, env, source.root))
            if name != "valkey":
                path = "readyz" if name == "worker" else "livez"
                wait_for(f"http://127.0.0.1:{port}/{path}", child, log)
            found[name] = psutil.Process(child.pid)
        found["web"] = found["web"].children()[0]
        yield Stack(port, found)
