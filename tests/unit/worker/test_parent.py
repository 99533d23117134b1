"""What ties a worker process to its launcher where the kernel does not."""

from __future__ import annotations

import os
import signal

import pytest

from worker.process import parent
from worker.process.parent import VARIABLE, Launch


def test_a_launch_is_read_as_it_was_written(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = Launch.new()
    monkeypatch.setenv(VARIABLE, launch.to_variable())
    assert Launch.present() == launch
    monkeypatch.delenv(VARIABLE)
    assert Launch.present().launcher == 0
    assert Launch.present().token != launch.token


def test_a_process_whose_launcher_has_gone_is_told_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[int, int]] = []
    parents = iter([5, 5, 5, 1])
    monkeypatch.setattr(parent, "_LOOK_S", 0.001)
    monkeypatch.setattr(os, "getppid", lambda: next(parents))
    monkeypatch.setattr(os, "kill", lambda *args: sent.append(args))
    parent._watch(5)
    assert sent == [(os.getpid(), signal.SIGTERM)]
