"""The scenarios by name, in the order of the table."""

from __future__ import annotations

from typing import Final

from scripts.commands.benching.scenarios.base import Scenario
from scripts.commands.benching.scenarios.closed_loop import Closed, Single
from scripts.commands.benching.scenarios.images import Images
from scripts.commands.benching.scenarios.mixed import Mixed
from scripts.commands.benching.scenarios.open_loop import Open
from scripts.commands.benching.scenarios.shared_prefix import SharedPrefix

SCENARIOS: Final[dict[str, Scenario]] = {
    each.name: each for each in (Single(), Closed(), Open(), SharedPrefix(), Mixed(), Images())
}
