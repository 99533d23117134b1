"""One model's continuous batch: admit, step, collect. The engine's thread steps it (`worker.engine.engine`).

Nothing here knows Redis. Task threads submit sequences, anybody may pass a word on (cancelled, expired, fenced),
and what the rows say goes to the publisher.

When the backend raises, its batch is lost, and which row was to blame is unknown. So the backend is reset and each
row of the lost batch is tried alone until it gives a token. One that raises alone is to blame and ends `failed`;
the others go on together, where they were. Every lost batch thus ends a row or moves all of them on by a token: it
never fails a neighbour and never goes on for ever. A batch that is lost for want of memory goes on in halves; then
every row that ends makes place for one more than before. Rows that raise alone one after another, with no token between
them, are not to blame: the engine is broken, and its death hands them to another worker.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from traceback import clear_frames
from typing import TypeAlias

from shared.errors import JobFailure
from shared.queue.claims import Verdict
from worker.engine.crowding import Crowding
from worker.engine.sequence import Outcome, Said, Sequence
from worker.runner import release
from worker.runner.base import Backend, BackendLoader, Fit, OutOfMemory, StepResult

logger = logging.getLogger(__name__)

MOST_LONE_FAILURES = 3
"""So many rows that raise alone in succession mean that the engine is at fault, not the rows."""


GAUGES_S = 1.0
"""Time between two readings of the backend's gauges."""


class Unloaded(Exception):
    """The model has been let go of."""


class EngineBroken(Exception):
    """Whatever it is given, the backend raises."""


@dataclass(frozen=True, slots=True)
class _Word:
    """What Redis says of a job: to be stopped, or not ours any more."""

    job_id: str
    attempt: int
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class _Drain:
    """Take nothing new; hand back what still runs at a moment (monotonic)."""

    until: float


_Message: TypeAlias = Sequence | _Word | _Drain


@dataclass(slots=True)
class Totals:
    """What the engine has done since it started, and the backend's gauges as they were last read."""

    steps: int = 0
    tokens: int = 0
    prompt_tokens: int = 0
    last_batch: int = 0
    gauges: dict[str, float] = field(default_factory=dict)


class OwnTime:
    """A clock for one model: it stands still while the engine's thread does something for others.

    What a step takes, and what fewer or more rows give, is judged by it: another model's steps in between are none of
    its own.

    Attributes:
        away_s: so long the thread was with others.
    """

    def __init__(self) -> None:
        self.away_s = 0.0

    def __call__(self) -> float:
        """Seconds, from any moment on."""
        return time.monotonic() - self.away_s


class Batch:
    """The rows of one model. `submit`, `heed` and `drain` may be called from any thread, the rest is the engine's.

    Args:
        load: gives the backend; a generator does so piece by piece, and yields how far it is.
        wake: called when there is something to do.

    Attributes:
        loaded: the warm backend, or why there is none: `Unloaded` after the end.
        progress_at: monotonic moment at which something was last gained: a token, a piece of a prompt, a row less.
        used_at: monotonic moment at which a row was last submitted.
        spent_s: what the engine's thread has spent on it, as `worker.engine.engine` reckons it.
        own_time: what passes for it alone.
    """

    def __init__(
        self,
        load: BackendLoader,
        slots: int,
        publish: Callable[[list[Said]], object],
        wake: Callable[[], object] = lambda: None,
        crowding: Crowding | None = None,
        own_time: OwnTime | None = None,
    ) -> None:
        self.loaded: Future[Backend] = Future()
        self.progress_at = self.used_at = time.monotonic()
        self.load_progress = 0.0
        self.spent_s = 0.0
        self.own_time = own_time or OwnTime()
        self.totals = Totals()
        self._load = load
        self._wake = wake
        self._slots = self._most_rows = slots
        self._publish = publish
        self._crowding = crowding or Crowding(slots, self.own_time)
        self._inbox: SimpleQueue[_Message] = SimpleQueue()  # its put is safe in a signal handler
        self._waiting: deque[Sequence] = deque()
        self._suspects: deque[Sequence] = deque()
        self._rows: dict[int, Sequence] = {}
        self._on_trial = False
        self._lone_failures = 0
        self._gauges_due = 0.0
        self._drain_until: float | None = None
        self._closed = False
        self._starved = False

    @property
    def backend(self) -> Backend:
        """The model; the engine's, once it is loaded."""
        return self._backend

    @property
    def slots_used(self) -> int:
        """Rows in the batch."""
        return len(self._rows)

    @property
    def row_cap(self) -> int:
        """Rows that may be in the batch: fewer than there are slots where more have proven slower, or too large."""
        return min(self._most_rows, self._crowding.cap)

    @property
    def busy(self) -> bool:
        """Whether it has anything to get on with."""
        return bool(self._rows or self._waiting or self._suspects)

    @property
    def idle(self) -> bool:
        """Whether nothing is asked of it either, or nothing can be done before it is granted more memory."""
        return (self._starved or not self.busy) and self._inbox.empty()

    def submit(self, sequence: Sequence) -> None:
        """Generate for this one as soon as a slot is free; after the end it is handed back at once."""
        self.used_at = time.monotonic()
        self._put(sequence)
        if self._closed:  # nobody receives any more: or only just, then one of us finds it
            for message in self._arrived():
                if isinstance(message, Sequence):
                    message.settle(Outcome.HANDED_BACK)

    def heed(self, job_id: str, attempt: int, verdict: Verdict) -> None:
        """Pass on what Redis says of a job. For jobs that are not here, nothing happens."""
        if verdict is not Verdict.OK:
            self._put(_Word(job_id, attempt, verdict))

    def drain(self, seconds: float) -> None:
        """Take nothing new, give what runs that long to end, then hand it back."""
        self._put(_Drain(time.monotonic() + seconds))

    def _put(self, message: _Message) -> None:
        self._inbox.put(message)
        self._wake()

    def _arrived(self) -> Iterator[_Message]:
        with suppress(Empty):
            while True:
                yield self._inbox.get_nowait()

    def loading(self) -> Iterator[None]:
        """Make the backend ready, a piece at a time; who waits for `loaded` gets it, or what was raised."""
        try:
            self._backend = yield from self._made()
            self._read_gauges()
        except Exception as error:  # noqa: BLE001 - a model library may raise anything
            _let_go(error)
            self.loaded.set_exception(error)
            return
        self.load_progress = 1.0
        self._got_on()
        self.loaded.set_result(self._backend)

    def _made(self) -> Generator[None, None, Backend]:
        made = self._load()
        if not isinstance(made, Generator):
            return made
        while True:
            try:
                self.load_progress = next(made)
            except StopIteration as end:
                backend: Backend = end.value
                return backend
            self._got_on()
            yield

    def load(self) -> None:
        """The same in one piece."""
        for _ in self.loading():
            pass

    def close(self) -> None:
        """The end: hand back what is left, keep what the next worker may use, and let go of the model."""
        self._closed = True
        for message in self._arrived():
            self._receive(message)
        self._hand_back()
        self._backend.close()
        del self._backend
        gone: Future[Backend] = Future()
        gone.set_exception(Unloaded())
        self.loaded = gone

    def grant(self, most_bytes: int, hoped_bytes: int = 0) -> None:
        """See `Backend.grant`; what waited for it may fit now."""
        self._starved = False
        self._backend.grant(most_bytes, hoped_bytes)

    def read_gauges(self) -> float:
        """Read the gauges when they are due; seconds until they are next."""
        if time.monotonic() >= self._gauges_due:
            self._read_gauges()
        return max(0.0, self._gauges_due - time.monotonic())

    def step(self) -> None:
        """Hear what arrived, admit, decode one token a row, collect."""
        self._starved = False
        for message in self._arrived():
            self._receive(message)
        try:
            self._admit()
            self._starved = not self._rows and self.busy and self._drain_until is None
            result = self._backend.step() if self._rows else None
        except Exception as error:  # noqa: BLE001 - a model library may raise anything
            self._batch_lost(error)
        else:
            if result is not None:
                self._collect(result)
        self._give_up_draining()
        self.read_gauges()

    def _read_gauges(self) -> None:
        self.totals.gauges = self._backend.stats()
        self._gauges_due = time.monotonic() + GAUGES_S

    def _got_on(self) -> None:
        self.progress_at = time.monotonic()

    def _receive(self, message: _Message) -> None:
        if not self.busy:
            self._got_on()  # or a long idle time would look like a stuck engine
        match message:
            case Sequence() if self._drain_until is None:
                self._waiting.append(message)
            case Sequence():
                self._publish([message.hand_back()])
            case _Word():
                self._obey(message)
            case _Drain(until):
                self._drain_until = until
                self._publish([sequence.hand_back() for sequence in self._waiting])
                self._waiting.clear()

    def _obey(self, word: _Word) -> None:
        sequence = self._take_out(word.job_id, word.attempt)
        if sequence is None:
            return
        self._got_on()
        if word.verdict is Verdict.FENCED:
            sequence.settle(Outcome.FENCED)
        else:
            self._publish([sequence.stop(word.verdict)])

    def _take_out(self, job_id: str, attempt: int) -> Sequence | None:
        """Remove a sequence from wherever it is; a slot it had is free at once."""
        for sequence in (*self._rows.values(), *self._waiting, *self._suspects):
            if sequence.job.id == job_id and sequence.job.attempt == attempt:
                break
        else:
            return None
        if sequence.uid in self._rows:
            self._remove([sequence.uid])
        elif sequence in self._waiting:
            self._waiting.remove(sequence)
        else:
            self._suspects.remove(sequence)
        return sequence

    def _admit(self) -> None:
        """Fill the free slots; but while there are suspects, try one of them alone."""
        if self._on_trial and self._rows:
            return
        trial = bool(self._suspects)
        source, most = (self._suspects, 1) if trial else (self._waiting, self._worth_while())
        while len(self._rows) < most and (sequence := self._next(source)):
            self._on_trial = trial
            sequence.admitted()
            self._rows[sequence.uid] = sequence
            self._backend.insert([sequence.row()])

    def _worth_while(self) -> int:
        """How many rows may be in the batch. Those that have been running before wait for no more than a slot."""
        resumed = any(sequence.resumed for sequence in self._waiting)
        return min(self._most_rows, self._crowding.most(len(self._rows), len(self._waiting), urgent=resumed))

    def _next(self, source: deque[Sequence]) -> Sequence | None:
        """The first in line, if there is memory for it: nobody overtakes it. One that would not fit alone ends here."""
        while source:
            fit = self._backend.fits(source[0].longest, source[0].media)
            if fit is Fit.LATER:
                break
            sequence = source.popleft()
            if fit is Fit.NOW:
                return sequence
            self._publish([_row_failed(sequence, OutOfMemory(f"{sequence.longest} tokens do not fit"))])
        return None

    def _collect(self, result: StepResult) -> None:
        uids = {uid for uid, _ in result.tokens}
        self._measure(result, uids)
        for uid, reused in result.prefilled.items():
            self._rows[uid].prefilled(reused)
        said = [_row_failed(self._rows.pop(uid), error) for uid, error in result.failed]
        said += self._push(result.tokens)
        self._remove([word.sequence.uid for word in said if word.outcome and word.sequence.uid in self._rows])
        self._most_rows = min(self._slots, self._most_rows + sum(word.outcome is not None for word in said))
        self._count(result, len(uids))
        if result.tokens:
            self._acquit()
        if said:
            self._publish(said)

    def _measure(self, result: StepResult, uids: Collection[int]) -> None:
        """Tell what the step gave to these rows, for what it took."""
        context = sum(self._rows[uid].length for uid in uids)
        only_decoded = len(uids) == len(self._rows) and not (result.prompt_tokens or result.prefilled or result.failed)
        self._crowding.stepped(len(uids), context, len(result.tokens), only_decoded)

    def _push(self, tokens: Iterable[tuple[int, int]]) -> list[Said]:
        """Give the rows their tokens, each until it ends. One that raises ends alone."""
        said = []
        for uid, token in tokens:
            sequence = self._rows[uid]
            if sequence.ending:
                continue
            self.totals.tokens += 1
            try:
                word = sequence.push(token)
            except Exception as error:  # noqa: BLE001 - whatever it is, it is this row's
                word = _row_failed(sequence, error)
            if word is not None:
                said.append(word)
        return said

    def _count(self, result: StepResult, rows: int) -> None:
        totals = self.totals
        totals.steps += 1
        totals.prompt_tokens += result.prompt_tokens
        totals.last_batch = rows
        if result.tokens or result.prompt_tokens or result.prefilled or result.failed:
            self._got_on()  # a step that gives nothing is no progress, however often it returns

    def _batch_lost(self, error: Exception) -> None:
        self._got_on()
        lost = list(self._rows.values())
        exhausted = isinstance(error, OutOfMemory)
        logger.error("the backend raised with %d rows in its batch", len(lost), exc_info=error)
        self._backend.reset()
        self._crowding.forget()
        self._rows.clear()
        self._on_trial = False
        if len(lost) > 1:
            if exhausted:  # nobody is to blame: there were too many of them
                self._most_rows = len(lost) // 2
                self._waiting.extendleft(reversed(lost))
            else:
                self._suspects.extend(lost)
            return
        if exhausted:
            self._publish([_row_failed(row, error) for row in lost])
            return
        self._lone_failures += 1
        if self._lone_failures >= MOST_LONE_FAILURES:
            raise EngineBroken(f"{self._lone_failures} rows in succession raised alone") from error
        self._publish([row.fail(JobFailure.ENGINE, "The model failed while it worked on this job.") for row in lost])

    def _acquit(self) -> None:
        """Tokens came. A row on trial steps aside until the other suspects have been tried."""
        self._lone_failures = 0
        if self._on_trial:
            self._on_trial = False
            self._waiting.extendleft(self._rows.values())
            self._remove(list(self._rows))

    def _remove(self, uids: list[int]) -> None:
        if uids:
            self._backend.remove(uids)
            for uid in uids:
                del self._rows[uid]

    def _give_up_draining(self) -> None:
        if self._drain_until is None or time.monotonic() < self._drain_until or not self.busy:
            return
        self._got_on()
        self._hand_back()

    def _hand_back(self) -> None:
        left = [*self._rows.values(), *self._waiting, *self._suspects]
        self._remove(list(self._rows))
        self._waiting.clear()
        self._suspects.clear()
        self._publish([sequence.hand_back() for sequence in left])


def _let_go(error: Exception) -> None:
    """Free what was loaded until this was raised: the exception is kept, and with it every variable on its way."""
    each: BaseException | None = error
    while each is not None:
        clear_frames(each.__traceback__)
        each = each.__cause__ or each.__context__
    release()


def _row_failed(sequence: Sequence, error: Exception) -> Said:
    job = sequence.job
    ids = {"job_id": job.id, "request_id": job.request_id}
    logger.error("a row failed; its neighbours go on", exc_info=error, extra=ids)
    if isinstance(error, OutOfMemory):
        return sequence.fail(JobFailure.MEMORY, "The worker has too little memory for this prompt and its answer.")
    return sequence.fail(JobFailure.ROW, "Generating this job's text failed.")
