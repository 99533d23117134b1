"""The processes of a stack, found by a variable in their environment.

The process tree does not help: if serve or supervisord is killed, init adopts their children.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import psutil

STACK_VARIABLE = "MLXQ_STACK"
_KILL_ROUNDS = 3
_SECOND_SIGNAL_S = 0.5
"""A worker ignores a second signal that arrives sooner: its launcher may have forwarded the first one."""


def stack_id(data_dir: Path) -> str:
    """The value of `MLXQ_STACK` in every process of the stack with this DATA_DIR."""
    return str(data_dir.resolve())


def find(data_dir: Path) -> list[psutil.Process]:
    """Return the stack's processes, without this process and its parents."""
    wanted = stack_id(data_dir)
    own = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    return [process for process in psutil.process_iter() if process.pid not in own and _stack_of(process) == wanted]


def _stack_of(process: psutil.Process) -> str | None:
    try:
        if process.uids().real != os.getuid() or process.status() == psutil.STATUS_ZOMBIE:
            return None
        return process.environ().get(STACK_VARIABLE)
    except (psutil.Error, OSError):  # the process has ended, or its environment is not readable
        return None


def terminate_all(data_dir: Path, grace_s: float) -> int:
    """Terminate the stack's processes, and kill those that do not end.

    Args:
        grace_s: time between SIGTERM and SIGKILL; with 0 they are killed at once.

    Returns:
        The number of processes found.
    """
    found = find(data_dir)
    valkey = [process for process in found if _runs(process, "valkey-server")]
    others = [process for process in found if process not in valkey]
    # supervisord is killed first, because it would restart the others. The second SIGTERM makes workers hand back
    # their jobs at once, so Valkey ends last.
    for _ in range(2):
        for process in others:
            _signal(process, kill=grace_s == 0 or _runs(process, "supervisor.supervisord"))
        psutil.wait_procs(others, timeout=min(grace_s, _SECOND_SIGNAL_S))
    psutil.wait_procs(others, timeout=grace_s)
    for process in valkey:
        _signal(process, kill=grace_s == 0)
    psutil.wait_procs(valkey, timeout=grace_s)
    _kill_remaining(data_dir)
    return len(found)


def _kill_remaining(data_dir: Path) -> None:
    """Kill what has not ended, and what was started meanwhile."""
    for _ in range(_KILL_ROUNDS):
        remaining = find(data_dir)
        for process in remaining:
            _signal(process, kill=True)
        psutil.wait_procs(remaining, timeout=2)


def _runs(process: psutil.Process, program: str) -> bool:
    try:
        return any(part.endswith(program) for part in process.cmdline()[:3])
    except psutil.Error:
        return False


def _signal(process: psutil.Process, *, kill: bool) -> None:
    with suppress(psutil.NoSuchProcess):
        process.kill() if kill else process.terminate()
