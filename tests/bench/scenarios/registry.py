"""All scenarios by name, in the order of the table."""

from __future__ import annotations

from typing import Final

from tests.bench.scenarios.base import Scenario
from tests.bench.scenarios.closed_loop import Closed, Single
from tests.bench.scenarios.images import Images
from tests.bench.scenarios.mixed import Mixed
from tests.bench.scenarios.open_loop import Open
from tests.bench.scenarios.shared_prefix import SharedPrefix

SCENARIOS: Final[dict[str, Scenario]] = {
    each.name: each for each in (Single(), Closed(), Open(), SharedPrefix(), Mixed(), Images())
}
