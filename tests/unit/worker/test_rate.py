"""The rate of generated tokens is an average over the last minute."""

from __future__ import annotations

from worker.service.model_worker import Rate


def test_only_the_last_minute_counts() -> None:
    now = [0.0]
    rate = Rate(lambda: now[0])
    assert rate.update(0) == 0.0
    for second in range(1, 301):
        now[0] = float(second)
        latest = rate.update(10 * second if second <= 200 else 2000 + 30 * (second - 200))
    assert latest == 30.0
    now[0] = 500.0
    rate.update(5000)
    now[0] = 600.0
    assert rate.update(5000) == 0.0
