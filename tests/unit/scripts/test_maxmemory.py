"""The default memory limit of a Redis that this service starts."""

from __future__ import annotations

import pytest

from scripts.stack.config import default_maxmemory, maxmemory
from shared.runtime import total_memory
from shared.settings import Settings

GIB = 2**30


@pytest.mark.parametrize(("memory", "expected"), [(GIB // 2, GIB // 4), (8 * GIB, 2 * GIB), (512 * GIB, 4 * GIB)])
def test_it_is_a_quarter_of_the_machine_within_bounds(memory: int, expected: int) -> None:
    assert default_maxmemory(memory) == expected


def test_the_setting_overrides_it() -> None:
    assert maxmemory(Settings(_env_file=None, redis_maxmemory_bytes=GIB)) == GIB
    assert maxmemory(Settings(_env_file=None)) == default_maxmemory(total_memory())
