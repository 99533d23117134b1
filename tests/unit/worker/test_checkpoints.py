"""Where the prefill of a prompt takes checkpoints of recurrent layers."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("mlx_lm")

from tests.support.runner import row
from worker.runner.kv_segments import Layout
from worker.runner.prefix.blocks import BLOCK
from worker.runner.prefix.checkpoints import INTERVAL, MIN_DISTANCE, SMALL_STATE_BYTES, TAIL, stops

LARGE = Layout(None, (2,), (2,), 0, 16, SMALL_STATE_BYTES + 1)
SMALL = replace(LARGE, state_bytes=SMALL_STATE_BYTES)
END = 7


def prompt(length: int, *ends: int) -> list[int]:
    """Return a prompt whose messages end after these numbers of tokens."""
    return [END if i + 1 in ends else 100 + i for i in range(length)]


def test_a_short_prompt_has_a_checkpoint_before_the_tail_of_its_template() -> None:
    assert stops(row(1, prompt(100)), LARGE, 0, 0) == [100 - TAIL]
    assert stops(row(1, prompt(20)), LARGE, 0, 0) == []
    continued = replace(row(1, prompt(150)), generated=50)
    assert stops(continued, LARGE, 0, 0) == [100 - TAIL]


def test_the_end_of_the_first_message_and_a_difference_from_earlier_prompts_are_checkpoints() -> None:
    one = row(1, prompt(500, 120, 300, 480))
    assert stops(one, LARGE, 0, 250, [END, 9]) == [120, 250, 500 - TAIL]
    assert stops(one, LARGE, 120, 250, [END]) == [250, 500 - TAIL]
    assert stops(replace(one, shared=130), LARGE, 0, 0) == [130, 500 - TAIL]


def test_long_prompts_have_regular_checkpoints() -> None:
    length = 2 * INTERVAL + 500
    assert stops(row(1, prompt(length)), LARGE, 0, 0) == [INTERVAL, 2 * INTERVAL, length - TAIL]
    assert stops(row(1, prompt(length)), LARGE, INTERVAL + 5, 0) == [2 * INTERVAL, length - TAIL]
    assert stops(row(1, prompt(3 * BLOCK)), SMALL, 0, 0) == [BLOCK, 2 * BLOCK, 3 * BLOCK - TAIL]


def test_checkpoints_close_to_the_reused_prefix_do_not_pay() -> None:
    one = row(1, prompt(100))
    assert stops(one, LARGE, 100 - TAIL - MIN_DISTANCE, 0) == [100 - TAIL]
    assert stops(one, LARGE, 100 - TAIL - MIN_DISTANCE + 1, 0) == []
