"""Where the prefill of a prompt takes checkpoints of recurrent layers, at which later rows can begin.

A later prompt often shares only the first part of this one: the system message, or everything before the tail of the
chat template, because the next turn of a conversation drops the thoughts that begin there.
"""

from __future__ import annotations

from collections.abc import Collection

from worker.output.format import PLAIN, MessageFormat
from worker.runner.base import Row
from worker.runner.kv_segments import Layout
from worker.runner.prefix.blocks import BLOCK

TAIL = 16
"""Maximum tokens at the end of a prompt that the next turn of a conversation does not repeat. Of 69 templates of public
models, 66 have at most a dozen: usually none, otherwise markers around thoughts, or a sentence before them. The other
three (two of Mistral, Command R+) move a text to the last message; these models have no recurrent layers."""

INTERVAL = 2048
"""Tokens between two checkpoints of a long prompt. The state of a large hybrid takes as much memory as the keys and
values of about 3,000 tokens."""

SMALL_STATE_BYTES = 2**16
"""Checkpoints of at most this size are taken at every block."""

MIN_DISTANCE = 16
"""Minimum tokens between the beginning of a prefill and the first checkpoint. Each checkpoint costs a pass."""


def stops(
    row: Row, layout: Layout, reused: int, matched: int, turn_ends: Collection[int] = (), form: MessageFormat = PLAIN
) -> list[int]:
    """Return the tokens of a prompt after which checkpoints are taken, in order, without the end of the prefill.

    Args:
        reused: number of tokens whose cache the row takes from the prefix cache.
        matched: number of tokens that an earlier row had in common with this one; the next row probably has them, too.
        turn_ends: ids of the tokens that end a message. The first message is the system message, if there is one.
        form: how the model marks its thoughts.
    """
    end = len(row.prompt) - 1
    interval = BLOCK if layout.state_bytes <= SMALL_STATE_BYTES else INTERVAL
    tail = _before_tail(row.prompt[: len(row.prompt) - row.generated], form)
    regular = range(reused - reused % interval + interval, end, interval)
    chosen = {row.shared, matched, tail, _first_turn_end(row.prompt, turn_ends), *regular}
    return sorted(each for each in chosen if reused + MIN_DISTANCE <= each < end)


def _before_tail(prompt: tuple[int, ...], form: MessageFormat) -> int:
    """Return how many tokens of a prompt the next turn of the conversation is sure to repeat.

    If the model has no markers around thoughts, `TAIL` tokens are left out. Otherwise the tail begins with a marker.
    The token before it is left out, too: it may be a line break that becomes one token with the text that follows it.
    """
    end = prompt[-TAIL:]
    start = form.thoughts_start(end)
    return len(prompt) - (TAIL if start is None else len(end) - start + 1)


def _first_turn_end(tokens: tuple[int, ...], turn_ends: Collection[int]) -> int:
    """Return the number of tokens up to the first end of a message; 0 if there is none."""
    return min((tokens.index(end) + 1 for end in turn_ends if end in tokens), default=0)
