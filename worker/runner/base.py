"""What the engine needs of a model library. `fake` (no MLX), `text` (mlx-lm) and `vision` (mlx-vlm) have it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Protocol

from shared.jobs.request import Request, Sampling
from shared.models.registry import ModelCard

IMAGE_TOKENS = 2**31
"""Token ids from here on stand for pieces of images. They fit into 32 bits, and no vocabulary comes near them."""


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


class Media(Protocol):
    """What stands in a prompt for tokens that are not text; only its backend knows more of it.

    Attributes:
        shift: by how much the model's positions behind it differ from the places of the tokens.
    """

    shift: int

    def release(self) -> None:
        """Let go of what only the reading of the prompt needs; it is made again if it is read again."""
        ...


@dataclass(frozen=True, slots=True)
class Prompt:
    """A request's prompt, as its row begins with it.

    Attributes:
        tokens: never empty. Those from `IMAGE_TOKENS` on stand for pieces of images; they tell them by content.
        shared: so many of them, from the first, are everybody's: at most its system message.
        media: what they stand for; None where all are text.
    """

    tokens: tuple[int, ...]
    shared: int = 0
    media: Media | None = None


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
        media: as its `Prompt` has it.
    """

    uid: int
    prompt: tuple[int, ...]
    generated: int
    room: int
    sampling: Sampling
    owner: str | None = None
    shared: int = 0
    media: Media | None = None


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
    weights_bytes: int

    def encode(self, generation: Request, images: Mapping[str, bytes]) -> Prompt:
        """The request's prompt, through the chat template when it has messages.

        Args:
            images: files of the images that the messages name, by digest.

        Raises:
            PromptError: the template refuses it, or it leaves no room in the context.
        """
        ...

    def detokenizer(self) -> Detokenizer:
        """A fresh one, for one sequence."""
        ...

    def fits(self, tokens: int, media: Media | None = None) -> Fit:
        """Whether there is memory for a row that may grow to so many tokens and shows this, beside those inserted."""
        ...

    def grant(self, most_bytes: int, hoped_bytes: int = 0) -> None:
        """Have so much memory for caches from now on; rows that are inserted keep what they have.

        Args:
            hoped_bytes: what it may have again before long, if that is more.
        """
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


BackendLoader = Callable[[], Backend | Generator[float, None, Backend]]
"""Loads and warms the model, at once or in pieces that each tell how far it is. Runs on the engine thread."""
