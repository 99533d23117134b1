"""The result of a soak, as tables and as JSON."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from tests.chaos.checks import Outcomes
from tests.chaos.faults import FaultKind
from tests.soak.fit import Fit
from tests.soak.load import Capacity, Load
from tests.soak.sampler import Samples
from tests.soak.verdicts import Findings, JobCount, Verdict

_HEADINGS: Final = ("process", "minutes", "MB", "MB/h", "descriptors", "per h", "threads", "per h", "flat")


@dataclass(frozen=True, slots=True)
class Report:
    """The result of a run.

    Attributes:
        began_s: start of the load, in seconds since the first sample.
        leaks: a line for each key, process, descriptor or thread that was left at the end.
    """

    options: argparse.Namespace
    capacity: Capacity
    load: Load
    began_s: float
    injected: Counter[FaultKind]
    outcomes: Outcomes
    samples: Samples
    found: Findings
    jobs: JobCount
    leaks: Sequence[str]

    @property
    def load_cores(self) -> float:
        """Mean number of cores that the stack and its clients used under the load."""
        return self.samples.cores(self.began_s, self.began_s + self.options.minutes * 60)

    @property
    def passed(self) -> bool:
        """Whether nothing grew, nothing was left, and every job ended once with its text."""
        return not any(self._problems())

    def _problems(self) -> Iterator[str]:
        yield from (f"{each.violation} {each.job_id}: {each.detail}" for each in self.outcomes.findings)
        yield from (f"GREW {line}" for line in self.found.growth())
        yield from (f"LEFT {line}" for line in self.leaks)
        if not self.jobs.once_each:
            yield f"COUNT {self.jobs.seen} jobs and {self.jobs.batch_lines} lines of batches had {self.jobs.ended} ends"

    def show(self, console: Console) -> None:
        """Print tables and problems."""
        console.print(self._processes(), self._totals(), sep="\n")
        for line in self._problems():
            console.print(line, soft_wrap=True, markup=False)

    def as_json(self) -> dict[str, Any]:
        """Return all figures and samples."""
        return {
            "minutes": self.options.minutes,
            "seed": self.options.seed,
            "capacity": {"sessions_per_s": round(self.capacity.per_s, 3), "cores": round(self.capacity.cores, 2)},
            "load_cores": round(self.load_cores, 2),
            "load_sessions_per_s": round(self.load.per_s, 3),
            "began_s": round(self.began_s, 1),
            "sessions": dict(self.load.sessions.ended),
            "sessions_skipped": self.load.skipped,
            "native_jobs": {behaviour.value: count for behaviour, count in self.outcomes.behaviours.items()},
            "faults": {kind.value: count for kind, count in self.injected.items()},
            "jobs": asdict(self.jobs),
            "resumed": self.outcomes.resumed,
            "problems": list(self._problems()),
            "processes": [_verdict(each) for each in self.found.processes],
            "redis": asdict(self.found.redis) if self.found.redis else None,
            "samples": {
                "processes": [
                    {**asdict(instance), "samples": [_sample(each) for each in taken]}
                    for instance, taken in sorted(self.samples.processes.items())
                ],
                "redis": [asdict(each) for each in self.samples.redis],
            },
        }

    def _processes(self) -> Table:
        table = Table(title=f"{self.options.minutes:g} minutes, seed {self.options.seed}")
        for heading in _HEADINGS:
            table.add_column(heading, justify="left" if heading == "process" else "right")
        for verdict in self.found.processes:
            table.add_row(*_cells(verdict))
        if (redis := self.found.redis) is not None:
            cells = ["memory of Redis", f"{redis.span_s / 60:.0f}", f"{redis.level:.1f}", f"{redis.per_hour:+.2f}"]
            table.add_row(*cells, "", "", "", "", _word([redis]))
        return table

    def _totals(self) -> Table:
        table = Table("total", "count")
        table.columns[1].justify = "right"
        table.add_row("capacity, sessions/s", f"{self.capacity.per_s:.2f}")
        table.add_row("load, sessions/s", f"{self.load.per_s:.2f}")
        table.add_row("cores at capacity, under load", f"{self.capacity.cores:.2f}, {self.load_cores:.2f}")
        for kind, count in sorted(self.load.sessions.ended.items()):
            table.add_row(f"sessions: {kind}", str(count))
        table.add_row("sessions not started, all clients busy", str(self.load.skipped))
        for fault, count in sorted(self.injected.items()):
            table.add_row(fault.value, str(count))
        table.add_row("jobs", str(self.jobs.seen + self.jobs.batch_lines))
        table.add_row("ends of jobs", str(self.jobs.ended))
        table.add_row("native jobs with more than one attempt", str(self.outcomes.resumed))
        table.add_row("problems", str(len(list(self._problems()))))
        return table


def _cells(verdict: Verdict) -> list[str]:
    memory, descriptors, threads = (verdict.fits[name] for name in ("rss_mb", "descriptors", "threads"))
    return [
        verdict.instance.role,
        f"{memory.span_s / 60:.0f}",
        f"{memory.level:.0f}",
        f"{memory.per_hour:+.2f}",
        f"{descriptors.level:.0f}",
        f"{descriptors.per_hour:+.2f}",
        f"{threads.level:.0f}",
        f"{threads.per_hour:+.2f}",
        _word(list(verdict.fits.values())),
    ]


def _word(fits: Sequence[Fit]) -> str:
    if not all(each.judged for each in fits):
        return "too short"
    return "yes" if all(each.flat for each in fits) else "no"


def _verdict(verdict: Verdict) -> dict[str, Any]:
    fits = {name: asdict(each) for name, each in verdict.fits.items()}
    return {**asdict(verdict.instance), "lived_s": round(verdict.lived_s, 1), "fits": fits}


def _sample(sample: Any) -> list[float]:
    return [round(sample.at_s, 1), round(sample.rss_mb, 2), sample.descriptors, sample.threads]
