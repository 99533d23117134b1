"""A chaos run passes only if nothing was lost, left behind or too slow."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from rich.console import Console

from tests.chaos.checks import Finding, Outcomes, Violation
from tests.chaos.faults import FaultKind
from tests.chaos.report import TAKEOVER_S, Report

KILLED = FaultKind.WORKER_KILLED


def report(
    times: Sequence[float], *others: FaultKind, leaks: Sequence[str] = (), outcomes: Outcomes | None = None
) -> Report:
    recovery: Any = SimpleNamespace(seconds={KILLED: times}, warm={KILLED: times})
    return Report(1, 1, "proxy", Counter([KILLED, *others]), outcomes or Outcomes(), recovery, leaks, {})


def shown(result: Report) -> str:
    out = io.StringIO()
    result.show(Console(file=out, width=200))
    return out.getvalue()


def test_takeovers_in_time_pass() -> None:
    result = report([TAKEOVER_S] * 95 + [60.0] * 5)
    assert result.passed
    assert "in time: p95 of 4.00 s" in shown(result)


def test_late_takeovers_fail() -> None:
    result = report([1.0] * 94 + [TAKEOVER_S + 0.1] * 6)
    assert not result.passed
    assert "TOO SLOW p95 of 4.10 s" in shown(result)
    assert result.as_json()["takeover_too_slow"]


def test_takeover_times_among_other_faults_are_only_reported() -> None:
    result = report([60.0], FaultKind.REDIS_KILLED)
    assert result.passed
    assert "SLOW" not in shown(result)
    assert result.as_json()["recovery_warm_s"][KILLED.value]["max"] == 60


def test_a_finding_or_a_leak_fails() -> None:
    outcomes = Outcomes()
    outcomes.add_finding(Finding(Violation.LOST, "job_1", "gone"))
    assert not report([], outcomes=outcomes).passed
    assert not report([], leaks=["worker-0 exited with status 70, 1 times"]).passed
