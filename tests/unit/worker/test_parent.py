"""How a worker process learns of its launcher, and ends with it on systems without parent-death signals."""

from __future__ import annotations

import os
import signal

import pytest

from worker.process import parent
from worker.process.parent import LAUNCH_VARIABLE, Launch


def test_a_launch_survives_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = Launch.new()
    monkeypatch.setenv(LAUNCH_VARIABLE, launch.to_variable())
    assert Launch.current() == launch
    monkeypatch.delenv(LAUNCH_VARIABLE)
    assert Launch.current().launcher == 0
    assert Launch.current().token != launch.token


def test_a_process_whose_launcher_died_gets_sigterm(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[int, int]] = []
    parents = iter([5, 5, 5, 1])
    monkeypatch.setattr(parent, "_POLL_S", 0.001)
    monkeypatch.setattr(os, "getppid", lambda: next(parents))
    monkeypatch.setattr(os, "kill", lambda *args: sent.append(args))
    parent._watch(5)
    assert sent == [(os.getpid(), signal.SIGTERM)]
