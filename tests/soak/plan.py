"""The faults of a soak: some processes live until the end, so that their memory can be followed.

Worker 1 and the youngest API process are killed again and again. Worker 0 is only paused and cut off, and the oldest
API process only loses connections. Redis and the background process, of which there is only one, are killed in the
first part of the run.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Final

from tests.chaos.faults import MAX_DURATION_S, Fault, FaultKind
from tests.chaos.stack import LEASE_S, WORKERS

EARLY: Final = 0.4
"""Share of the run in which single processes are killed."""
_VICTIM: Final = 1


@dataclass(frozen=True, slots=True)
class _Rate:
    """How often a kind of fault occurs.

    Attributes:
        per_hour: each kind occurs at least once.
        victim: whether only the processes are hit that need not live until the end.
        until: share of the run after which the kind does not occur.
    """

    per_hour: float
    victim: bool = False
    until: float = 0.9


RATES: Final = {
    FaultKind.WORKER_KILLED: _Rate(12, victim=True),
    FaultKind.WORKER_STOPPED: _Rate(4, victim=True),
    FaultKind.WORKER_PAUSED: _Rate(6),
    FaultKind.WORKER_CUT_OFF: _Rate(6),
    FaultKind.API_KILLED: _Rate(8, victim=True),
    FaultKind.CLIENTS_KILLED: _Rate(10),
    FaultKind.BACKGROUND_KILLED: _Rate(4, until=EARLY),
    FaultKind.REDIS_KILLED: _Rate(4, until=EARLY),
}


def schedule(seed: int, minutes: float) -> list[Fault]:
    """Draw the faults of a run. The same arguments give the same schedule."""
    rng = random.Random(seed)
    faults = [
        Fault(
            at_s=round(rng.uniform(0.02, rate.until) * minutes * 60, 3),
            kind=kind,
            target=_VICTIM if rate.victim else rng.randrange(WORKERS),
            duration_s=round(rng.choice((rng.uniform(0.2, LEASE_S), rng.uniform(LEASE_S, MAX_DURATION_S))), 3),
        )
        for kind, rate in RATES.items()
        for _ in range(max(1, round(rate.per_hour * minutes / 60)))
    ]
    return sorted(faults, key=lambda fault: fault.at_s)
