"""Where the prefill of a prompt takes checkpoints of recurrent layers, at which later rows can begin.

A later prompt often shares only the first part of this one: the system message, or everything before the tail of the
chat template, because the next turn of a conversation drops the thoughts that follow it.
"""

from __future__ import annotations

from collections.abc import Collection

from worker.runner.base import Row
from worker.runner.kv_segments import Layout
from worker.runner.prefix.blocks import BLOCK

TAIL = 16
"""Maximum tokens after the last message of a prompt: the chat template's beginning of the answer and of its thoughts.
Those of the templates of Qwen, gpt-oss, Gemma, GLM and DeepSeek have 2 to 9 tokens."""

INTERVAL = 2048
"""Tokens between two checkpoints of a long prompt. The state of a large hybrid takes as much memory as the keys and
values of about 3,000 tokens."""

SMALL_STATE_BYTES = 2**16
"""Checkpoints of at most this size are taken at every block."""

MIN_DISTANCE = 16
"""Minimum tokens between the beginning of a prefill and the first checkpoint. Each checkpoint costs a pass."""


def stops(row: Row, layout: Layout, reused: int, matched: int, turn_ends: Collection[int] = ()) -> list[int]:
    """Return the tokens of a prompt after which checkpoints are taken, in order, without the end of the prefill.

    Args:
        turn_ends: ids of the tokens that end a message. The first message is the system message, if there is one.
        reused: number of tokens whose cache the row takes from the prefix cache.
        matched: number of tokens that an earlier row had in common with this one: likely so has the next one.
    """
    end = len(row.prompt) - 1
    interval = BLOCK if layout.state_bytes <= SMALL_STATE_BYTES else INTERVAL
    tail = len(row.prompt) - row.generated - TAIL
    regular = range(reused - reused % interval + interval, end, interval)
    chosen = {row.shared, matched, tail, _first_turn_end(row.prompt, turn_ends), *regular}
    return sorted(each for each in chosen if reused + MIN_DISTANCE <= each < end)


def _first_turn_end(tokens: tuple[int, ...], turn_ends: Collection[int]) -> int:
    """Return the number of tokens up to the first end of a message; 0 if there is none."""
    return min((tokens.index(end) + 1 for end in turn_ends if end in tokens), default=0)
