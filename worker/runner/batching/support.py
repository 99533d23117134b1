"""How far rows of a model may share passes, and still have the logits that they have alone.

`worker.runner.batching_proof` measures it for each model. Prefill and the length buckets group rows by it.
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
    """What is exact for a model.

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
        """Whether anything is not exact."""
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
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> Self:
        """The opposite of `to_dict`.

        Raises:
            KeyError, ValueError: it is none.
        """
        return cls(
            Together(found["prefill"]), Together(found["decode"]), bool(found["continues"]), str(found["reason"])
        )


UNRESTRICTED = BatchingSupport()
"""Every row has the same logits beside any others."""
