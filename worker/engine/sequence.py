"""One row's whole state: what was asked, what was generated, what was said of it."""

from __future__ import annotations

import itertools
import threading
import time
from enum import Enum, auto
from typing import NamedTuple

from shared.errors import JobFailure
from shared.jobs.log import Written
from shared.jobs.record import Ending, Job, Status
from shared.queue.claims import Verdict
from worker.engine.stops import StopMatcher
from worker.runner.base import Backend, Media, Prompt, Row

_uids = itertools.count(1)


class Outcome(Enum):
    """How this process is done with a sequence."""

    ENDED = auto()
    """Its ending is in Redis."""
    HANDED_BACK = auto()
    """What it said is in Redis; the job is to go back to the queue."""
    FENCED = auto()
    """The job is another's now, or has ended without us."""


class Said(NamedTuple):
    """What a row has to tell Redis after a step; with an `outcome`, the last of it."""

    sequence: Sequence
    text: str = ""
    tokens: tuple[int, ...] = ()
    ending: Ending | None = None
    outcome: Outcome | None = None


class ReplayError(Exception):
    """The tokens in the log do not give the text in the log: another model wrote it."""


class Sequence:
    """A claimed job on its way through the engine.

    Made and awaited by a task thread, pushed by the engine thread, settled by the publisher thread (or by whoever
    learns first that the job is not ours any more). The completion tokens it counts are those consumed, with the
    one that ended it, as mlx_lm.server counts them.

    Attributes:
        uid: its name in the engine and the backend.
        next_event: number of its next chunk event; the publisher's.
        prompt: the request's token ids, once they are known.
        generated: token ids generated so far, those of earlier attempts first, without the end token.
    """

    def __init__(self, job: Job, backend: Backend) -> None:
        self.uid = next(_uids)
        self.job = job
        self.next_event = job.last_event + 1
        self.prompt: tuple[int, ...] = ()
        self._begun = Prompt(())
        self.generated: list[int] = []
        self.ending: Ending | None = None
        self.outcome: Outcome | None = None
        self._eos = backend.eos
        self._context = backend.card.context
        self._limit = job.generation.max_tokens
        self._detokenizer = backend.detokenizer()
        self._stops = StopMatcher(job.generation.stop)
        self._text: list[str] = []
        self._text_known = job.attempt <= 1  # what earlier attempts wrote is not, before it is replayed
        self._unsaid: list[int] = []
        self._reused: int | None = None
        self._clock = _Clock(job)
        self._settled = threading.Event()

    def replay(self, written: Written) -> Said | None:
        """Take up what earlier attempts wrote, without saying it again; its end when that was all.

        Raises:
            ReplayError: the log is not this model's.
        """
        words = (self.push(token) for token in written.tokens)
        end = next((word for word in words if word is not None and word.ending), None)
        text = "".join(self._text)
        if not text.startswith(written.text) or (end is None and text != written.text):
            raise ReplayError(self.job.id)
        self._text_known = True
        self._unsaid.clear()
        self._clock.forget_first_token()
        return end and end._replace(text=text[len(written.text) :], tokens=())

    def begin(self, prompt: Prompt) -> Said | None:
        """Give it its prompt; its end when that leaves nothing to generate."""
        self._begun = prompt
        self.prompt = prompt.tokens
        self._limit = min(self._limit, self._context - len(self.prompt))
        return self._end("length") if len(self.generated) >= self._limit else None

    @property
    def length(self) -> int:
        """Its tokens so far, with its prompt."""
        return len(self.prompt) + len(self.generated)

    @property
    def resumed(self) -> bool:
        """Whether it has been running before, here or elsewhere."""
        return self.job.attempt > 1 or bool(self.generated)

    @property
    def longest(self) -> int:
        """How many tokens it may grow to, with its prompt."""
        return len(self.prompt) + self._limit

    @property
    def media(self) -> Media | None:
        """What its prompt shows."""
        return self._begun.media

    def row(self) -> Row:
        """What the backend must know to go on from here."""
        generated = len(self.generated)
        return Row(
            uid=self.uid,
            prompt=(*self.prompt, *self.generated),
            generated=generated,
            room=self._limit - generated,
            sampling=self.job.generation.sampling,
            owner=self.job.owner,
            shared=self._begun.shared,
            media=self.media,
        )

    def admitted(self) -> None:
        """It has a slot; its prefill begins."""
        self._clock.admitted()

    def prefilled(self, reused: int = 0) -> None:
        """Its prompt is in the cache, and so many of its tokens were there before."""
        if self._reused is None:  # what it finds when it begins again here, it has left there itself
            self._reused = reused
        self._clock.prefilled()

    def push(self, token: int) -> Said | None:
        """Take the next token; what there is to say now, if anything."""
        self._clock.token()
        if token in self._eos:
            return self._end("stop", unseen=1)
        self.generated.append(token)
        self._unsaid.append(token)
        text, stopped = self._stops.push(self._detokenizer.add(token))
        if stopped:
            return self._finish(Status.SUCCEEDED, text, reason="stop")
        if len(self.generated) >= self._limit:
            return self._end("length", text)
        if not text:
            return None  # the tokens go with the text they become part of: a later attempt makes them again
        self._text.append(text)
        tokens, self._unsaid = tuple(self._unsaid), []
        return Said(self, text, tokens)

    def stop(self, verdict: Verdict) -> Said:
        """End it as cancelled or expired, with the text so far."""
        return self._finish(Status(verdict.value))

    def fail(self, failure: JobFailure, message: str) -> Said:
        """End it as failed, with the text so far."""
        return self._finish(Status.FAILED, code=failure, message=message, text_known=self._text_known)

    def hand_back(self) -> Said:
        """Leave it to another attempt."""
        return Said(self, outcome=Outcome.HANDED_BACK)

    def settle(self, outcome: Outcome) -> None:
        """Tell the task thread that this process is done with it. The first outcome counts."""
        if self.outcome is None:
            self.outcome = outcome
            self._settled.set()

    def wait(self) -> Outcome:
        """Wait until it is settled. The job's deadline, the watchdog and the drain see to it that it will be."""
        while self.outcome is None:
            self._settled.wait()
        return self.outcome

    def _end(self, reason: str, text: str = "", unseen: int = 0) -> Said:
        """End by itself: what detokenizer and matcher hold back is text after all, if no stop string is in it."""
        tail, stopped = self._stops.push(self._detokenizer.finish())
        if not stopped:
            tail += self._stops.flush()
        return self._finish(Status.SUCCEEDED, text + tail, reason="stop" if stopped else reason, unseen=unseen)

    def _finish(
        self,
        status: Status,
        text: str = "",
        *,
        reason: str | None = None,
        unseen: int = 0,
        code: JobFailure | None = None,
        message: str | None = None,
        text_known: bool = True,
    ) -> Said:
        self._text.append(text)
        self.ending = Ending(
            status=status,
            text="".join(self._text) if text_known else None,
            finish_reason=reason,
            prompt_tokens=len(self.prompt),
            completion_tokens=len(self.generated) + unseen,
            cached_tokens=min(self._reused or 0, len(self.prompt)),
            timings=self._clock.timings(),
            error_code=code,
            error_message=message,
        )
        return Said(self, text, tuple(self._unsaid), self.ending, Outcome.ENDED)


class _Clock:
    """A job's timings. Redis stamped its creation and its first start; from the claim on, our own clock counts.

    A job is queued until the engine takes it into the batch. A first token that an earlier attempt gave has no time
    here: unknown is better than wrong.
    """

    def __init__(self, job: Job) -> None:
        self._first_attempt = job.attempt <= 1
        self._queue_s = (job.started_at or job.created_at) - job.created_at
        self._claimed = time.monotonic()
        # A first attempt was claimed at its start. Of a later one only the wall clock knows how old the job is.
        self._age = self._queue_s if self._first_attempt else max(self._queue_s, time.time() - job.created_at)
        self._admitted: float | None = None
        self._prefilled: float | None = None
        self._first_token: float | None = None
        self._tell_first_token = True

    def admitted(self) -> None:
        if self._admitted is None:
            self._admitted = time.monotonic()

    def prefilled(self) -> None:
        if self._prefilled is None:
            self._prefilled = time.monotonic()

    def token(self) -> None:
        if self._first_token is None:
            self._first_token = time.monotonic()

    def forget_first_token(self) -> None:
        if self._first_token is not None:
            self._tell_first_token = False

    def _queued(self) -> float:
        if self._first_attempt and self._admitted is not None:
            return self._queue_s + self._admitted - self._claimed
        return self._queue_s

    def timings(self) -> dict[str, float]:
        timings = {"queue_s": self._queued(), "total_s": self._age + time.monotonic() - self._claimed}
        if self._admitted is not None and self._prefilled is not None:
            timings["prefill_s"] = self._prefilled - self._admitted
        if self._first_token is not None and self._tell_first_token:
            timings["first_token_s"] = self._age + self._first_token - self._claimed
        return timings
