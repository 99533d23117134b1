"""When requests come that do not wait for one another."""

from __future__ import annotations

import random


def poisson(per_s: float, seconds: float, seed: int) -> list[float]:
    """The moments, in seconds from the start, of a Poisson process of that rate; the same seed gives the same."""
    draw = random.Random(seed)
    moments: list[float] = []
    moment = draw.expovariate(per_s)
    while moment < seconds:
        moments.append(moment)
        moment += draw.expovariate(per_s)
    return moments
