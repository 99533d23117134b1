"""What the engine needs of a model library. `fake` (no MLX), `text` (mlx-lm) and later `vision` provide it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Protocol

from shared.jobs import Generation, Sampling
from shared.registry import ModelCard


class PromptError(Exception):
    """A request that this model cannot take; `code` is a `shared.errors.JobFailure` value."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(detail)
        self.code = code


class OutOfMemory(Exception):
    """The device has no memory left for what was asked of it."""


class Fit(Enum):
    """Whether there is memory for one more row."""

    NOW = auto()
    LATER = auto()
    """When others have ended."""
    NEVER = auto()
    """It would not fit even alone."""


class Detokenizer(Protocol):
    """Turns one row's tokens into text, holding back what is not a whole character yet."""

    def add(self, token: int) -> str:
        """The text that this token completes; often empty."""
        ...

    def finish(self) -> str:
        """What is still held back, once no token follows."""
        ...


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence as a backend sees it.

    Attributes:
        uid: the engine's name for it, unique in this process.
        prompt: token ids to prefill: the request's, then those that earlier attempts generated. Never empty.
        generated: how many of them are generated: the first token sampled has position `generated`.
        room: most tokens it may still generate.
        owner: whose prefixes it may reuse and adds to, beside those that are everybody's; None: nobody's.
        shared: so many tokens of its prompt, from the first, become everybody's.
    """

    uid: int
    prompt: tuple[int, ...]
    generated: int
    room: int
    sampling: Sampling
    owner: str | None = None
    shared: int = 0


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step did.

    Attributes:
        tokens: (uid, token) of each row that decoded; a row's first follows its whole prompt. A row may have got
            several, in order, and no more than its room; what follows an end among them is to be passed over.
        prefilled: uids whose prompt is now in the cache (their first token comes with a later step or this one), and
            how many of its tokens an earlier row had left there.
        failed: (uid, error) of rows that raised; the backend has removed them already.
        prompt_tokens: how many prompt tokens this step processed.
    """

    tokens: Sequence[tuple[int, int]] = ()
    prefilled: Mapping[int, int] = field(default_factory=dict)
    failed: Sequence[tuple[int, Exception]] = ()
    prompt_tokens: int = 0


class Backend(Protocol):
    """A warm model.

    Only the engine thread calls it, but for `detokenizer`, which any thread may, and `encode`, which any may, one at a
    time.
    """

    card: ModelCard
    eos: frozenset[int]
    about: dict[str, object]

    def encode(self, generation: Generation) -> tuple[int, ...]:
        """The request's prompt as token ids, through the chat template when it has messages.

        Raises:
            PromptError: the template refuses it, or it leaves no room in the context.
        """
        ...

    def shared(self, generation: Generation, prompt: tuple[int, ...]) -> int:
        """How many tokens of its prompt the request gives to everybody: at most its system message. As `encode`."""
        ...

    def detokenizer(self) -> Detokenizer:
        """A fresh one, for one sequence."""
        ...

    def fits(self, tokens: int) -> Fit:
        """Whether there is memory for a row that may grow to so many tokens, beside those inserted."""
        ...

    def insert(self, rows: Sequence[Row]) -> None:
        """Add rows; they prefill in the following steps, in this order."""
        ...

    def step(self) -> StepResult:
        """Decode a token or more for each row that has its prompt in the cache; prefill a chunk of those that have not.

        Raises:
            OutOfMemory: the whole batch is lost, because it is too large; call `reset`.
            Exception: the whole batch is lost; call `reset`.
        """
        ...

    def remove(self, uids: Iterable[int]) -> None:
        """Drop rows in whatever stage they are; their slots are free at once. Unknown uids are passed over."""
        ...

    def reset(self) -> None:
        """Drop every row and all that was kept of earlier ones, and start with an empty batch."""
        ...

    def stats(self) -> dict[str, float]:
        """Gauges for `/metrics`, cheap to get: memory in bytes and the like."""
        ...

    def close(self) -> None:
        """The end: keep what the next worker may use. Takes a second at most."""
        ...


BackendLoader = Callable[[], Backend]
"""Loads and warms the model. Runs on the engine thread."""
