"""Describes which rows of a model may share passes and still have the same logits as alone.

`worker.runner.batching.proof` measures this for each model. Prefill and the length buckets group rows by it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Self

from worker.runner.base import RemainingPrompt


class Together(StrEnum):
    """Which rows may share a pass."""

    ANY = "any"
    EQUAL_LENGTHS = "equal_lengths"
    ONE_BY_ONE = "one_by_one"


@dataclass(frozen=True, slots=True)
class BatchingSupport:
    """Which ways of batching do not change the logits of a model.

    Attributes:
        prefill: prompts that may be prefilled together. `EQUAL_LENGTHS`: the model ignores the padding behind shorter
            prompts, which then changes their rows.
        decode: rows that may decode together. `EQUAL_LENGTHS`: the model ignores the padding before shorter rows.
        continues: whether a prompt may be prefilled in any pieces. If not, prefixes are not reused, and a prompt is
            prefilled in the same pieces whenever it is prefilled.
        reason: what was measured where rows are restricted; empty where they are not.
    """

    prefill: Together = Together.ANY
    decode: Together = Together.ANY
    continues: bool = True
    reason: str = ""

    @property
    def restricted(self) -> bool:
        """Whether some way of batching is not allowed."""
        return not self.continues or {self.prefill, self.decode} != {Together.ANY}

    @property
    def speculates(self) -> bool:
        """Whether rows may verify several draft tokens in a pass, after which their lengths differ."""
        return self.continues and self.decode is not Together.EQUAL_LENGTHS

    def may_prefill(self, first: RemainingPrompt, other: RemainingPrompt) -> bool:
        """Whether two rows may be prefilled together, after which they are in one bucket."""
        same_tokens = first.tokens == other.tokens
        same_length = same_tokens and first.position == other.position
        if Together.ONE_BY_ONE in (self.prefill, self.decode):
            return False
        return (self.prefill is Together.ANY or same_tokens) and (self.decode is Together.ANY or same_length)

    def may_decode(self, rows: Collection[int], joining: Sequence[int]) -> bool:
        """Whether rows of these lengths may join a bucket that has rows of those lengths."""
        match self.decode:
            case Together.ANY:
                return True
            case Together.EQUAL_LENGTHS:
                return len({*rows, *joining}) == 1
            case Together.ONE_BY_ONE:
                return not rows

    def to_dict(self) -> dict[str, Any]:
        """Return the fields in a form that JSON can represent."""
        return asdict(self)

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> Self:
        """Parse the output of `to_dict`.

        Raises:
            KeyError, ValueError: a field is missing or invalid.
        """
        return cls(
            Together(found["prefill"]), Together(found["decode"]), bool(found["continues"]), str(found["reason"])
        )


UNRESTRICTED = BatchingSupport()
"""The logits of a row never depend on the other rows."""
