"""A running request's whole state: what was asked, what was generated, what was published of it."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from enum import Enum, auto
from typing import Any, Final, NamedTuple, TypeAlias

from shared.errors import JobFailure
from shared.jobs.record import Ending, Job, Status
from shared.jobs.request import Request
from shared.queue.claims import ClaimedJob, WriteResult
from worker.engine.stops import StopMatcher
from worker.engine.timings import Timings
from worker.runner.base import ModelRunner, Prompt, Row, TokenOutput

_uids = itertools.count(1)


class Outcome(Enum):
    """How this process is done with a sequence."""

    ENDED = auto()
    """Its ending is in Redis."""
    HANDED_BACK = auto()
    """What it generated is in Redis; the job returns to the queue."""
    FENCED = auto()
    """The job belongs to another attempt now, or has ended without this one."""


class SequenceOutput(NamedTuple):
    """What the publisher writes about a sequence after a step.

    Attributes:
        outputs: the tokens whose text is complete with `text`, in order, without the end token.
        text: to be appended to the job's text. A stop string may make it shorter than the texts of `outputs`.
        started: the row was admitted to the batch: the attempt begins. Once per sequence, before everything else.
        ending: the job ends with this.
        outcome: set on the last output of a sequence; the publisher settles it when this is written.
    """

    sequence: Sequence
    outputs: tuple[TokenOutput, ...] = ()
    text: str = ""
    started: bool = False
    ending: Ending | None = None
    outcome: Outcome | None = None

    @property
    def tokens(self) -> tuple[int, ...]:
        """Ids of the tokens."""
        return tuple(output.token for output in self.outputs)


OnSettled: TypeAlias = Callable[["Sequence", Outcome], object]


LEAST_LOGPROB: Final = -9999.0
"""Stands for minus infinity and for what is no number: JSON has neither."""


def _finite(logprob: float) -> float:
    return round(max(LEAST_LOGPROB, logprob), 6)


class Sequence:
    """A claimed job on its way through the engine.

    Created by the claimer, changed by the engine thread, settled by the publisher thread or the engine thread.

    Args:
        on_settled: called exactly once, by the thread that settles it; must not block.

    Attributes:
        uid: its name in the engine and the runner, unique in this process.
        next_event: number of its next chunk event; the publisher's.
        new_tokens: the prompt's token ids, if they are not stored with the job yet; written when the attempt starts.
        generated: token ids generated so far, those of earlier attempts first, without the end token.
        limit: most tokens that may be generated in all.
        unpublished: tokens whose text is not complete yet.
        token_texts: of each token whose log-probability is published; empty for rows that do not ask.
        started: whether it was admitted to the batch before.
        blocked_at: moment at which it first found too little memory while it waits; the scheduler's.
        ending: how the job ends, once that is known.
        outcome: set when it is settled.
    """

    def __init__(
        self,
        claimed: ClaimedJob,
        prompt: Prompt,
        runner: ModelRunner,
        on_settled: OnSettled = lambda _sequence, _outcome: None,
    ) -> None:
        self.uid = next(_uids)
        self.claimed = claimed
        self.prompt = prompt
        self.next_event = self.job.last_event + 1
        self.generated: list[int] = []
        self.limit = min(self.request.max_tokens, runner.card.context - len(prompt.tokens))
        self.detokenizer = runner.detokenizer()
        self.stops = StopMatcher(self.request.stop)
        self.timings = Timings(claimed)
        self.unpublished: list[TokenOutput] = []
        self.token_texts: dict[int, str] = {}
        self.started = False
        self.blocked_at: float | None = None
        self.new_tokens: tuple[int, ...] | None = None
        self.ending: Ending | None = None
        self.outcome: Outcome | None = None
        self._cached_tokens: int | None = None
        self._on_settled = on_settled
        self._settling = threading.Lock()

    @property
    def job(self) -> Job:
        """The job's record as it was claimed."""
        return self.claimed.job

    @property
    def request(self) -> Request:
        """What was asked."""
        return self.claimed.request

    @property
    def length(self) -> int:
        """Tokens of the prompt and those generated so far."""
        return len(self.prompt.tokens) + len(self.generated)

    @property
    def remaining(self) -> int:
        """Most tokens that may still be generated."""
        return self.limit - len(self.generated)

    @property
    def longest(self) -> int:
        """Most tokens it may grow to, with its prompt."""
        return len(self.prompt.tokens) + self.limit

    @property
    def resumed(self) -> bool:
        """Whether it has run before, here or elsewhere."""
        return self.started or self.job.attempt > 1 or bool(self.generated)

    def row(self) -> Row:
        """Return what the runner needs to continue from here."""
        return Row(
            uid=self.uid,
            request=self.request,
            prompt=(*self.prompt.tokens, *self.generated),
            generated=len(self.generated),
            max_new_tokens=self.remaining,
            owner=self.job.owner,
            shared=self.prompt.shared,
            media=self.prompt.media,
        )

    def start(self) -> SequenceOutput:
        """Note the first admission to the batch."""
        self.started = True
        return SequenceOutput(self, started=True)

    def prefilled(self, cached_tokens: int) -> None:
        """Note that the prompt is in the cache; `cached_tokens` of it came from the prefix cache."""
        if self._cached_tokens is None:  # after a preemption it finds its own tokens
            self._cached_tokens = cached_tokens
        self.timings.prefilled()

    def stop(self, write_result: WriteResult) -> SequenceOutput:
        """End the job as cancelled or expired, with the text so far."""
        return self.finish(Status(write_result.value))

    def fail(self, code: JobFailure, message: str) -> SequenceOutput:
        """End the job as failed, with the text so far."""
        return self.finish(Status.FAILED, code=code, message=message)

    def hand_back(self) -> SequenceOutput:
        """Leave the job to another attempt."""
        return SequenceOutput(self, outcome=Outcome.HANDED_BACK)

    def describe_logprob(self, output: TokenOutput) -> dict[str, Any]:
        """Return a token's log-probability and its alternatives', as a chunk event carries them."""
        top = [
            {"token": self.token_texts.get(token, ""), "logprob": _finite(each)} for token, each in output.top_logprobs
        ]
        return {
            "token": self.token_texts.get(output.token, output.text),
            "logprob": _finite(output.logprob or 0.0),
            "top": top,
        }

    def finish(
        self,
        status: Status,
        text: str = "",
        *,
        reason: str | None = None,
        end_tokens: int = 0,
        code: JobFailure | None = None,
        message: str | None = None,
    ) -> SequenceOutput:
        """End the job.

        Args:
            text: the last text.
            end_tokens: tokens that count as generated beside those of `generated`: the end token.
        """
        self.ending = Ending(
            status=status,
            finish_reason=reason,
            prompt_tokens=len(self.prompt.tokens),
            completion_tokens=len(self.generated) + end_tokens,
            cached_tokens=min(self._cached_tokens or 0, len(self.prompt.tokens)),
            timings=self.timings.as_dict(),
            error_code=code,
            error_message=message,
        )
        # A job that ends by itself before it was admitted has had its attempt.
        starts = not self.started and status in (Status.SUCCEEDED, Status.FAILED)
        self.started = self.started or starts
        outputs, self.unpublished = tuple(self.unpublished), []
        return SequenceOutput(self, outputs, text, starts, self.ending, Outcome.ENDED)

    def settle(self, outcome: Outcome) -> None:
        """Report that this process is done with it. The first outcome counts."""
        with self._settling:
            if self.outcome is not None:
                return
            self.outcome = outcome
        self._on_settled(self, outcome)
