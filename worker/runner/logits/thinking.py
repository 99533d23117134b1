"""The tokens around a model's reasoning, for constraints and thinking budgets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Self

from worker.output.format import MessageFormat
from worker.output.tool_calls import HARMONY

Encode = Callable[[str], tuple[int, ...]]
"""Returns the token ids of a text with special tokens."""

_ANALYSIS: Final = "<|channel|>analysis<|message|>"
_MESSAGE_END: Final = "<|end|>"
_FINAL: Final = "<|end|><|start|>assistant<|channel|>final<|message|>"


@dataclass(frozen=True, slots=True)
class ThinkMarkers:
    """Token sequences around reasoning; none of them is empty.

    Attributes:
        forced: what is generated when the thinking budget is used up; begins with `end`.
        is_open: whether a prompt ends inside the reasoning.
        whole: whether the model writes its reasoning in messages of its own, so that a grammar has to describe all
            messages of the answer. Otherwise it begins after the reasoning.
    """

    start: tuple[int, ...]
    end: tuple[int, ...]
    forced: tuple[int, ...]
    is_open: Callable[[Sequence[int]], bool]
    whole: bool = False

    @classmethod
    def of(cls, form: MessageFormat, encode: Encode) -> Self | None:
        """Return the markers of a model; None if it does not mark its reasoning."""
        if is_harmony(form):
            return cls(encode(_ANALYSIS), encode(_MESSAGE_END), encode(_FINAL), lambda _prompt: False, whole=True)
        if not form.think_start or not form.think_end:
            return None
        return cls(form.think_start, form.think_end, form.think_end, form.reasoning_is_open)


def is_harmony(form: MessageFormat) -> bool:
    """Whether a model writes messages in the channels of gpt-oss."""
    return form.tool is not None and form.tool.name == HARMONY


def overlap(tokens: Sequence[int], marker: Sequence[int]) -> int:
    """Return how many of a marker's first tokens are the last of `tokens`."""
    last = tuple(tokens)
    return next((n for n in range(min(len(marker), len(last)), 0, -1) if last[-n:] == tuple(marker[:n])), 0)
