"""The result of a run, as tables and as JSON."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.chaos.checks import Outcomes, Violation
from tests.chaos.faults import FaultKind
from tests.chaos.recovery import Recovery
from tests.chaos.stack import LEASE_S

TAKEOVER_S = 2 * LEASE_S
"""Within this time, 95 % of a killed worker's jobs must continue if another ready worker has free slots."""


@dataclass(frozen=True, slots=True)
class Report:
    """The result of a run.

    Attributes:
        injected: how often each kind of fault hit a target.
        leaks: a line for each key, lease or process that was left at the end.
        impossible: kinds of faults that this machine does not support, with the reason.
    """

    seed: int
    minutes: float
    network: str
    injected: Counter[FaultKind]
    outcomes: Outcomes
    recovery: Recovery
    leaks: Sequence[str]
    impossible: Mapping[FaultKind, str]

    @property
    def passed(self) -> bool:
        """Whether all guarantees held."""
        return not self.outcomes.findings and not self.leaks and not self.too_slow

    @property
    def takeover_p95(self) -> float | None:
        """Seconds until a killed worker's jobs continued on another; None if there were faults of other kinds."""
        times = self.recovery.warm.get(FaultKind.WORKER_KILLED)
        return summary(times)["p95"] if times and set(+self.injected) == {FaultKind.WORKER_KILLED} else None

    @property
    def too_slow(self) -> bool:
        """Whether they continued later than guaranteed."""
        return self.takeover_p95 is not None and self.takeover_p95 > TAKEOVER_S

    def show(self, console: Console) -> None:
        """Print tables, findings and leaks."""
        console.print(self._faults(), self._jobs(), sep="\n")
        for finding in self.outcomes.findings:
            line = f"{finding.violation.upper()} {finding.job_id}: {finding.detail}"
            console.print(line, soft_wrap=True, markup=False)
        for leak in self.leaks:
            console.print(f"LEAK {leak}", soft_wrap=True, markup=False)
        if self.takeover_p95 is not None:
            rating = "TOO SLOW" if self.too_slow else "in time:"
            line = f"{rating} p95 of {self.takeover_p95:.2f} s until another worker continued"
            console.print(f"{line}, guaranteed {TAKEOVER_S:g} s", soft_wrap=True, markup=False)

    def as_json(self) -> dict[str, Any]:
        """Return all figures and findings."""
        return {
            "seed": self.seed,
            "minutes": self.minutes,
            "network": self.network,
            "faults": {kind.value: count for kind, count in self.injected.items()},
            "impossible": {kind.value: why for kind, why in self.impossible.items()},
            "jobs": len(self.outcomes.accepted),
            "styles": {behaviour.value: count for behaviour, count in self.outcomes.behaviours.items()},
            "ends": Counter(status.value for status in self.outcomes.ended.values()),
            "resumed": self.outcomes.resumed,
            **{violation.value: self.outcomes.count(violation) for violation in Violation},
            "recovery_s": {kind: summary(times) for kind, times in self.recovery.seconds.items()},
            "recovery_warm_s": {kind: summary(times) for kind, times in self.recovery.warm.items()},
            "takeover_p95_s": self.takeover_p95,
            "takeover_too_slow": self.too_slow,
            "findings": [asdict(finding) for finding in self.outcomes.findings],
            "left_behind": list(self.leaks),
        }

    def _faults(self) -> Table:
        table = Table(
            "fault",
            title=f"seed {self.seed}, {self.minutes:g} minutes, network: {self.network}",
            caption="seconds from the fault to the next token of each affected job;\n"
            "taken over: if another ready worker had free slots at that time",
        )
        for heading in ("count", "jobs", "p50", "p95", "max", "taken over", "p50", "p95", "max"):
            table.add_column(heading, justify="right")
        for kind in FaultKind:
            if kind in self.impossible:
                table.add_row(kind.value, "0", self.impossible[kind])
                continue
            affected, warm = self.recovery.seconds.get(kind, []), self.recovery.warm.get(kind, [])
            if self.injected[kind]:
                table.add_row(kind.value, str(self.injected[kind]), *_cells(affected), *_cells(warm))
        return table

    def _jobs(self) -> Table:
        table = Table("jobs", "count")
        table.columns[1].justify = "right"
        table.add_row("accepted", str(len(self.outcomes.accepted)))
        for behaviour, count in sorted(self.outcomes.behaviours.items()):
            table.add_row(f"  {behaviour.value}", str(count))
        for status, count in sorted(Counter(self.outcomes.ended.values()).items()):
            table.add_row(f"ended {status.value}", str(count))
        table.add_row("with more than one attempt", str(self.outcomes.resumed))
        for violation in Violation:
            table.add_row(violation.value, str(self.outcomes.count(violation)), style="" if self.passed else "bold")
        table.add_row("left behind", str(len(self.leaks)))
        return table


def summary(times: Sequence[float]) -> dict[str, float]:
    """Return count, p50, p95 and maximum; only the count if there are no values."""
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
