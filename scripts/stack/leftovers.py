"""The processes of a stack, found by the mark each carries in its environment.

Parents do not serve to find them: when serve or supervisord is killed, their children are given to init.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import psutil

MARK = "MLXQ_STACK"
_ROUNDS = 3
_SECOND_SIGNAL_S = 0.5
"""Workers take a second signal that comes sooner for the first one's echo from their launcher."""


def mark(data_dir: Path) -> str:
    """The value of `MLXQ_STACK` in every process of the stack that lives in this folder."""
    return str(data_dir.resolve())


def find(data_dir: Path) -> list[psutil.Process]:
    """The stack's processes, but for this one."""
    wanted = mark(data_dir)
    own = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    return [each for each in psutil.process_iter() if each.pid not in own and _mark_of(each) == wanted]


def _mark_of(process: psutil.Process) -> str | None:
    try:
        if process.uids().real != os.getuid() or process.status() == psutil.STATUS_ZOMBIE:
            return None
        return process.environ().get(MARK)
    except (psutil.Error, OSError):  # gone, or not for us to read
        return None


def end_all(data_dir: Path, patience_s: float) -> int:
    """End the stack's processes, politely first.

    Args:
        patience_s: time they get after SIGTERM; 0 kills at once.

    Returns:
        How many there were.
    """
    found = find(data_dir)
    queue = [process for process in found if _runs(process, "valkey-server")]
    others = [process for process in found if process not in queue]
    # Supervisord first and without mercy: it would start again what ends. A second signal makes workers hand their
    # jobs back at once; for that the queue must still be there.
    for _ in range(2):
        for process in others:
            _signal(process, kill=patience_s == 0 or _runs(process, "supervisor.supervisord"))
        psutil.wait_procs(others, timeout=min(patience_s, _SECOND_SIGNAL_S))
    psutil.wait_procs(others, timeout=patience_s)
    for process in queue:
        _signal(process, kill=patience_s == 0)
    psutil.wait_procs(queue, timeout=patience_s)
    # Asked anew: something may have been started in the meantime.
    for _ in range(_ROUNDS):
        stubborn = find(data_dir)
        for process in stubborn:
            _signal(process, kill=True)
        psutil.wait_procs(stubborn, timeout=2)
    return len(found)


def _runs(process: psutil.Process, program: str) -> bool:
    try:
        return any(part.endswith(program) for part in process.cmdline()[:3])
    except psutil.Error:
        return False


def _signal(process: psutil.Process, *, kill: bool) -> None:
    with suppress(psutil.NoSuchProcess):
        process.kill() if kill else process.terminate()
