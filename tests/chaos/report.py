"""What a run has shown: a table for people, an object for programs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.chaos.checks import Fault, Ledger
from tests.chaos.faults import Kind
from tests.chaos.fleet import LEASE_S
from tests.chaos.recovery import Recovery

TAKEOVER_S = 2 * LEASE_S
"""A killed worker's jobs go on within so long, where another warm worker has slots: 95 of 100 of them."""


@dataclass(frozen=True, slots=True)
class Report:
    """A run.

    Attributes:
        struck: how often each fault hit.
        leaks: what was left behind at the end, a line each; empty when all is as it should be.
        impossible: faults that this machine cannot bring about, and why.
    """

    seed: int
    minutes: float
    network: str
    struck: Counter[Kind]
    ledger: Ledger
    recovery: Recovery
    leaks: Sequence[str]
    impossible: Mapping[Kind, str]

    @property
    def kept(self) -> bool:
        """Whether every promise was."""
        return not self.ledger.findings and not self.leaks and not self.too_slow

    @property
    def takeover_p95(self) -> float | None:
        """Seconds until a killed worker's jobs went on at another; None where faults of other kinds were in the way."""
        times = self.recovery.warm.get(Kind.WORKER_KILLED)
        return summary(times)["p95"] if times and set(+self.struck) == {Kind.WORKER_KILLED} else None

    @property
    def too_slow(self) -> bool:
        """Whether they went on later than promised."""
        return self.takeover_p95 is not None and self.takeover_p95 > TAKEOVER_S

    def show(self, console: Console) -> None:
        """Print it."""
        console.print(self._faults(), self._jobs(), sep="\n")
        for finding in self.ledger.findings:
            console.print(f"{finding.fault.upper()} {finding.job_id}: {finding.detail}", soft_wrap=True, markup=False)
        for leak in self.leaks:
            console.print(f"LEFT BEHIND {leak}", soft_wrap=True, markup=False)
        if self.takeover_p95 is not None:
            verdict = "TOO SLOW" if self.too_slow else "in time:"
            told = f"{verdict} p95 of {self.takeover_p95:.2f} s until another worker went on, promised {TAKEOVER_S:g} s"
            console.print(told, soft_wrap=True, markup=False)

    def as_json(self) -> dict[str, Any]:
        """All of it."""
        return {
            "seed": self.seed,
            "minutes": self.minutes,
            "network": self.network,
            "faults": {kind.value: count for kind, count in self.struck.items()},
            "impossible": {kind.value: why for kind, why in self.impossible.items()},
            "jobs": len(self.ledger.accepted),
            "styles": {style.value: count for style, count in self.ledger.styles.items()},
            "ends": Counter(status.value for status in self.ledger.ended.values()),
            "resumed": self.ledger.resumed,
            **{fault.value: self.ledger.count(fault) for fault in Fault},
            "recovery_s": {kind: summary(times) for kind, times in self.recovery.seconds.items()},
            "recovery_warm_s": {kind: summary(times) for kind, times in self.recovery.warm.items()},
            "takeover_p95_s": self.takeover_p95,
            "takeover_too_slow": self.too_slow,
            "findings": [asdict(finding) for finding in self.ledger.findings],
            "left_behind": list(self.leaks),
        }

    def _faults(self) -> Table:
        table = Table(
            "fault",
            title=f"seed {self.seed}, {self.minutes:g} minutes, network: {self.network}",
            caption="seconds from the fault to the next token of each job that it hit;\n"
            "taken over: where another warm worker had the slots at that moment",
        )
        for heading in ("times", "jobs hit", "p50", "p95", "max", "taken over", "p50", "p95", "max"):
            table.add_column(heading, justify="right")
        for kind in Kind:
            if kind in self.impossible:
                table.add_row(kind.value, "0", self.impossible[kind])
                continue
            hit, warm = self.recovery.seconds.get(kind, []), self.recovery.warm.get(kind, [])
            if self.struck[kind]:
                table.add_row(kind.value, str(self.struck[kind]), *_cells(hit), *_cells(warm))
        return table

    def _jobs(self) -> Table:
        table = Table("jobs", "count")
        table.columns[1].justify = "right"
        table.add_row("accepted", str(len(self.ledger.accepted)))
        for style, count in sorted(self.ledger.styles.items()):
            table.add_row(f"  {style.value}", str(count))
        for status, count in sorted(Counter(self.ledger.ended.values()).items()):
            table.add_row(f"ended {status.value}", str(count))
        table.add_row("worked on by more than one attempt", str(self.ledger.resumed))
        for fault in Fault:
            table.add_row(fault.value, str(self.ledger.count(fault)), style="" if self.kept else "bold")
        table.add_row("left behind", str(len(self.leaks)))
        return table


def summary(times: Sequence[float]) -> dict[str, float]:
    """Count, p50, p95 and maximum; only the count where there is nothing."""
    if not times:
        return {"count": 0}
    ordered = sorted(times)
    return {
        "count": len(ordered),
        "p50": round(_quantile(ordered, 0.5), 3),
        "p95": round(_quantile(ordered, 0.95), 3),
        "max": round(ordered[-1], 3),
    }


def _quantile(ordered: Sequence[float], q: float) -> float:
    return ordered[max(0, math.ceil(q * len(ordered)) - 1)]


def _cells(times: Sequence[float]) -> list[str]:
    figures = summary(times)
    if not times:
        return ["", "", "", ""]
    return [str(figures["count"]), *(f"{figures[name]:.2f}" for name in ("p50", "p95", "max"))]
