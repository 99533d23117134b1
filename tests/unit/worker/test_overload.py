"""Interactive rows keep their times to the first token above the capacity, on simulated devices."""

from __future__ import annotations

import pytest

from shared.jobs.record import Priority
from tests.bench.batch_engine import DEVICES
from tests.bench.overload import loads
from tests.bench.samples import quantile
from worker.service.model_worker import SLOTS_PER_RESERVED_ROW

SLOTS, REQUESTS = 32, 3000
LIMIT = 2.0


@pytest.mark.long
@pytest.mark.parametrize("name", DEVICES)
def test_p99_at_120_percent_is_at_most_twice_that_at_50_percent(name: str) -> None:
    half, above = loads(DEVICES[name], SLOTS, SLOTS // SLOTS_PER_RESERVED_ROW, REQUESTS)
    assert quantile(above.first_s, 0.99) <= LIMIT * quantile(half.first_s, 0.99)
    assert above.ended[Priority.BATCH] > REQUESTS / 10, "the batch runs meanwhile"
