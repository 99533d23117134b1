"""The cost of prefill passes, by which the engine divides long prompts into chunks. `prefill_cost` measures it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PrefillCost:
    """Seconds of a prefill pass on an otherwise idle device, measured during warm-up. Only ratios are reliable.

    A pass reads the weights once, computes each token, and lets each token attend to all tokens before it. The
    attention part grows with the position; on a CPU it dominates the cost of a long prompt.

    Attributes:
        fixed: seconds per pass.
        token: seconds per token of the pass.
        attention: seconds per pair of a token of the pass and a token in the cache.
    """

    fixed: float
    token: float
    attention: float

    def seconds(self, tokens: int, position: int) -> float:
        """Return the seconds of a pass over `tokens` tokens with `position` tokens in the cache."""
        return self.fixed + tokens * self._each(position) if tokens else 0.0

    def tokens(self, seconds: float, position: int) -> float:
        """Return how many tokens a pass of this duration processes with `position` tokens in the cache."""
        return (seconds - self.fixed) / self._each(position)

    def efficient(self, position: int) -> float:
        """Return the number of tokens below which two thirds of a pass are the fixed cost."""
        return self.fixed / 2 / self._each(position)

    def _each(self, position: int) -> float:
        return self.token + position * self.attention


UNKNOWN_COST = PrefillCost(0.0, 1.0, 0.0)
"""Used when nothing was measured: all tokens cost the same."""
