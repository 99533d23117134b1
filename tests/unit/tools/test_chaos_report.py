"""What a chaos run says of itself: kept only when nothing was lost, left behind or too slow."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from rich.console import Console

from tests.chaos.checks import Fault, Finding, Ledger
from tests.chaos.faults import Kind
from tests.chaos.report import TAKEOVER_S, Report

KILLED = Kind.WORKER_KILLED


def report(times: Sequence[float], *others: Kind, leaks: Sequence[str] = (), ledger: Ledger | None = None) -> Report:
    recovery: Any = SimpleNamespace(seconds={KILLED: times}, warm={KILLED: times})
    return Report(1, 1, "proxy", Counter([KILLED, *others]), ledger or Ledger(), recovery, leaks, {})


def shown(told: Report) -> str:
    out = io.StringIO()
    told.show(Console(file=out, width=200))
    return out.getvalue()


def test_jobs_taken_over_in_time_keep_the_promise() -> None:
    told = report([TAKEOVER_S] * 95 + [60.0] * 5)
    assert told.kept
    assert "in time: p95 of 4.00 s" in shown(told)


def test_jobs_taken_over_too_late_break_it() -> None:
    told = report([1.0] * 94 + [TAKEOVER_S + 0.1] * 6)
    assert not told.kept
    assert "TOO SLOW p95 of 4.10 s" in shown(told)
    assert told.as_json()["takeover_too_slow"]


def test_among_other_faults_the_time_is_only_told() -> None:
    told = report([60.0], Kind.REDIS_KILLED)
    assert told.kept
    assert "SLOW" not in shown(told)
    assert told.as_json()["recovery_warm_s"][KILLED.value]["max"] == 60


def test_a_finding_or_something_left_behind_breaks_it() -> None:
    ledger = Ledger()
    ledger.find(Finding(Fault.LOST, "job_1", "gone"))
    assert not report([], ledger=ledger).kept
    assert not report([], leaks=["worker-0 ended by itself with status 70, 1 times"]).kept
