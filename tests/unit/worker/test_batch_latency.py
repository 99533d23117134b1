"""Interactive rows keep their times to the first token beside a batch, on simulated devices."""

from __future__ import annotations

import pytest

from tests.bench.batch_engine import DEVICES, Load, ratio
from worker.service.model_worker import SLOTS_PER_RESERVED_ROW

SLOTS, REQUESTS = 32, 200
LIMIT = 1.5


@pytest.mark.parametrize("name", DEVICES)
def test_the_time_to_the_first_token_stays_within_a_bound_beside_a_batch(name: str) -> None:
    alone = Load(DEVICES[name], SLOTS, 0, batch=False).run(REQUESTS)
    beside = Load(DEVICES[name], SLOTS, SLOTS // SLOTS_PER_RESERVED_ROW, batch=True).run(REQUESTS)
    assert ratio(alone, beside, 0.99) <= LIMIT
    assert beside.batch_tokens > 10 * REQUESTS, "the batch runs meanwhile"
