"""A batch of 10,000 lines runs in flat memory, beside interactive clients."""

from __future__ import annotations

import pytest

from tests.bench.batch_memory import measure

LINES = 10_000
MAX_GROWTH_MB = 20.0


@pytest.mark.long
def test_memory_is_flat() -> None:
    figures = measure(LINES)
    growth = figures.growth(LINES // 10)
    assert set(growth) == {"web", "worker", "background", "valkey"}
    assert max(growth.values()) <= MAX_GROWTH_MB, growth
    assert figures.requests > 100, "interactive requests ran meanwhile"
