"""A stack whose model costs nothing: Valkey, one API process, a worker with the fake backend, and the CPU each takes.

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

from scripts.commands.benching.processes import process, wait_for
from scripts.commands.ports import free_port
from scripts.commands.stack.config import programs, valkey_conf, valkey_conf_path
from shared.settings import ROOT, Settings

KEY = "mlxq_00000000_" + "k" * 43


@dataclass(frozen=True)
class Stack:
    """What runs."""

    port: int
    processes: dict[str, psutil.Process]

    def pids(self) -> dict[str, int]:
        """The process ids."""
        return {name: each.pid for name, each in self.processes.items()}

    def cpu_s(self) -> dict[str, float]:
        """User and system time that each process has used, in seconds."""
        times = {name: each.cpu_times() for name, each in self.processes.items()}
        return {name: each.user + each.system for name, each in times.items()}


@contextmanager
def modelless(*, worker: bool = True, **variables: str) -> Iterator[Stack]:
    """Start Valkey, one API process and, unless told otherwise, one worker; end them."""
    with tempfile.TemporaryDirectory(prefix="mlxq-bench-") as folder, ExitStack() as exits:
        home, port = Path(folder), free_port()
        env = {
            "ENV_FILE": os.devnull,
            "DATA_DIR": str(home),
            "REDIS_URL": "",
            "BROKER_URL": "",
            "BACKEND": "fake",
            "PORT": str(port),
            "MLXQ_API_KEY": KEY,
            "RATE_LIMIT": "1000000/second",
            "WEB_WORKERS": "1",
            "PYTHONPATH": str(ROOT),
            **variables,
        }
        settings = Settings(_env_file=None, data_dir=home)
        for each in (settings.run_dir, home / "valkey"):
            each.mkdir()
        valkey_conf_path(settings).write_text(valkey_conf(settings))
        commands = {program.name: list(program.command) for program in programs(settings)}
        wanted = ["valkey", "web", *(["worker"] if worker else [])]
        found: dict[str, psutil.Process] = {}
        for name in wanted:
            log = home / f"{name}.log"
            child = exits.enter_context(process(commands[name], log, env))
            if name != "valkey":
                path = "readyz" if name == "worker" else "livez"
                wait_for(f"http://127.0.0.1:{port}/{path}", child, log)
            found[name] = psutil.Process(child.pid)
        (found["web"],) = found["web"].children()
        yield Stack(port, found)
