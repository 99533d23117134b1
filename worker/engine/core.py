"""One model's engine: receive, schedule, execute, publish, once per step. `worker.engine.engine` steps it.

Knows nothing of Redis. The claimer submits sequences, any thread may pass on a result (cancelled, expired, fenced),
and what rows generate goes to the publisher.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Generator, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from traceback import clear_frames
from typing import TypeAlias

from shared.errors import JobFailure
from shared.queue.claims import WriteResult
from worker.engine.inbox import Drain, Inbox, JobWriteResult, Message
from worker.engine.output import OutputProcessor, row_failed
from worker.engine.scheduler import Capacity, Schedule, Scheduler
from worker.engine.sequence import Outcome, Sequence, SequenceOutput
from worker.runner import release
from worker.runner.base import ModelRunner, OutOfMemory, RunnerLoader, StepOutput

logger = logging.getLogger(__name__)

GAUGES_S = 1.0
"""Time between two readings of the runner's gauges."""

Trace: TypeAlias = Callable[[list[str]], object]


class Unloaded(Exception):
    """The model has been unloaded."""


@dataclass(slots=True)
class Totals:
    """What the engine has done since it started, and the gauges as they were last read."""

    steps: int = 0
    tokens: int = 0
    prompt_tokens: int = 0
    last_batch: int = 0
    gauges: dict[str, float] = field(default_factory=dict)


class OwnTime:
    """A clock for one model that stands still while the engine thread works for other models.

    Attributes:
        away_s: seconds that the thread spent on others.
    """

    def __init__(self) -> None:
        self.away_s = 0.0

    def __call__(self) -> float:
        """Seconds since an arbitrary moment."""
        return time.monotonic() - self.away_s


class EngineCore:
    """The engine of one model.

    Any thread may call `submit`, `apply_write_result`, `drain`, `capacity` and `waiting`; the rest is the engine
    thread's alone.

    Args:
        load: gives the runner; a generator loads it in pieces and yields the progress.
        slots: most rows in the batch.
        publish: takes the output of sequences, to be written; must not block.
        wake: called when there is something to do.
        trace: called with the ids of the jobs in the batch whenever they change, before the step.

    Attributes:
        loaded: the warm runner, or why there is none: `Unloaded` after the end.
        load_progress: 0 to 1.
        own_time: clock that stands still while the engine thread works for other models.
        progress_at: monotonic moment of the last progress: a token, prompt tokens, a row less.
        used_at: monotonic moment at which a sequence was last submitted.
        spent_s: seconds of the engine thread that count as this model's, for `worker.engine.engine`.
    """

    def __init__(
        self,
        load: RunnerLoader,
        slots: int,
        publish: Callable[[list[SequenceOutput]], object],
        wake: Callable[[], object] = lambda: None,
        trace: Trace = lambda _job_ids: None,
    ) -> None:
        self.loaded: Future[ModelRunner] = Future()
        self.progress_at = self.used_at = time.monotonic()
        self.load_progress = 0.0
        self.spent_s = 0.0
        self.own_time = OwnTime()
        self.totals = Totals()
        self._load = load
        self._slots = slots
        self._publish = publish
        self._inbox = Inbox(wake)
        self._trace = trace
        self._traced: list[str] = []
        self._gauges_due = 0.0
        self._drain_until: float | None = None
        self._version = -1
        self._shared_scheduler: Scheduler | None = None  # for other threads: None before and after
        self._closed = self._starved = False

    @property
    def runner(self) -> ModelRunner:
        """The model, once it is loaded."""
        return self._runner

    @property
    def slots_used(self) -> int:
        """Rows in the batch."""
        scheduler = self._shared_scheduler
        return 0 if scheduler is None else len(scheduler.running)

    @property
    def busy(self) -> bool:
        """Whether it has any row."""
        scheduler = self._shared_scheduler
        return scheduler is not None and scheduler.busy

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do, or nothing can be done before more memory is granted."""
        return (self._starved or not self.busy) and self._inbox.empty

    def submit(self, sequence: Sequence) -> None:
        """Generate for a sequence as soon as it fits; once the model is unloaded it is handed back at once."""
        self.used_at = time.monotonic()
        self._inbox.put(sequence)
        if self._closed:  # the engine thread may have missed it: either thread settles it
            for message in self._inbox.receive():
                if isinstance(message, Sequence):
                    message.settle(Outcome.HANDED_BACK)

    def apply_write_result(self, job_id: str, attempt: int, write_result: WriteResult) -> None:
        """Pass on what Redis says of a job. Ignores jobs that are not here."""
        if write_result is not WriteResult.OK:
            self._inbox.put(JobWriteResult(job_id, attempt, write_result))

    def drain(self, seconds: float) -> None:
        """Accept nothing new; hand back waiting rows at once, and rows that still run after `seconds`."""
        self._inbox.put(Drain(time.monotonic() + seconds))

    def capacity(self) -> Capacity:
        """Return what could be admitted now beside the submitted sequences; nothing before the model is loaded."""
        return self._inbox.capacity()

    def waiting(self) -> list[str]:
        """Return the ids of jobs that were submitted and never in the batch, in the order of admission."""
        return self._inbox.waiting()

    def loading(self) -> Iterator[None]:
        """Load the runner piece by piece; `loaded` then holds it, or what was raised."""
        try:
            self._runner = yield from self._load_pieces()
            self._scheduler = Scheduler(self._runner, self._slots, self.own_time)
            self._output_processor = OutputProcessor(self._runner.eos, self._runner.detokenizer)
            self._read_gauges()
        except Exception as error:  # noqa: BLE001 - a model library may raise anything
            _free_frames(error)
            self.loaded.set_exception(error)
            return
        self.load_progress, self._shared_scheduler = 1.0, self._scheduler
        self._refresh()
        self._note_progress()
        self.loaded.set_result(self._runner)

    def load(self) -> None:
        """Load the runner in one go."""
        for _ in self.loading():
            pass

    def close(self) -> None:
        """Unload: hand back all rows, keep what the next worker may use, and free the model."""
        self._closed = True
        for message in self._inbox.receive():
            self._receive(message)
        self._hand_back([*self._scheduler.running.values(), *self._scheduler.waiting])
        self._refresh()
        self._runner.close()
        self._shared_scheduler = None
        del self._runner, self._scheduler, self._output_processor
        unloaded: Future[ModelRunner] = Future()
        unloaded.set_exception(Unloaded())
        self.loaded = unloaded

    def grant(self, limit_bytes: int, hoped_bytes: int = 0) -> None:
        """Set the memory for caches; see `Scheduler.grant`. What waited for memory may fit now."""
        self._starved = False
        self._scheduler.grant(limit_bytes, hoped_bytes)
        self._refresh()

    def read_gauges(self) -> float:
        """Read the gauges when they are due; seconds until they are due again."""
        if time.monotonic() >= self._gauges_due:
            self._read_gauges()
        return max(0.0, self._gauges_due - time.monotonic())

    def step(self) -> None:
        """Receive, schedule, execute, publish."""
        for message in self._inbox.receive():
            self._receive(message)
        schedule = self._scheduler.schedule()
        self._put_out([row_failed(*each) for each in schedule.failed])
        self._put_out([row.start() for row in schedule.insert if not row.started])
        self._refresh()
        try:
            output = self._execute(schedule)
        except Exception as error:  # noqa: BLE001 - a model library may raise anything
            self._recover(error)
        else:
            if output is not None:
                self._update(output)
        self._end_drain()
        self._refresh()
        self.read_gauges()

    def _execute(self, schedule: Schedule) -> StepOutput | None:
        """Change the batch, then run one step of it; None where it is empty."""
        self._starved = not self._scheduler.running and self.busy and self._drain_until is None
        if schedule.remove:
            self._runner.remove(schedule.remove)
        if schedule.insert:
            self._runner.insert([sequence.row() for sequence in schedule.insert])
        if not self._scheduler.running:
            return None
        plan = self._scheduler.plan(self._runner.prefillable(), self._runner.images_waiting())
        return self._runner.execute(plan)

    def _update(self, output: StepOutput) -> None:
        """Publish what a step gave, once the slots of rows that ended are free."""
        rows = self._scheduler.running
        results = [row_failed(*each) for each in self._scheduler.update(output)]
        results += self._output_processor.process(rows, output.tokens)
        ended = [result.sequence for result in results if result.outcome and result.sequence.uid in rows]
        for sequence in ended:
            self._scheduler.finish(sequence)
        leaving = [sequence.uid for sequence in ended]
        if output.tokens:
            leaving += self._scheduler.acquit()
        if leaving:
            self._runner.remove(leaving)
        self._count(output)
        self._put_out(results)

    def _count(self, output: StepOutput) -> None:
        totals = self.totals
        totals.steps += 1
        totals.tokens = self._output_processor.tokens
        totals.prompt_tokens += output.prompt_tokens
        totals.last_batch = len({each.uid for each in output.tokens})
        if output.tokens or output.prompt_tokens or output.prefilled or output.failed or output.out_of_memory:
            self._note_progress()  # a step without any result is no progress

    def _recover(self, error: Exception) -> None:
        """The batch is lost; see `worker.engine.scheduler`."""
        self._note_progress()
        logger.error("step_failed", exc_info=error, extra={"rows": len(self._scheduler.running)})
        self._runner.reset()
        self._put_out([_lone_row_failed(*each) for each in self._scheduler.lose(error)])

    def _refresh(self) -> None:
        """Publish a changed batch: to the runner's prefix limit, the breadcrumb, and the snapshot for other threads."""
        if self._scheduler.version == self._version and not self._inbox.snapshot_due:
            return
        self._version = self._scheduler.version
        self._runner.set_prefix_limit(self._scheduler.prefix_bytes())
        jobs = [sequence.job.id for sequence in self._scheduler.running.values()]
        if jobs != self._traced:
            self._traced = jobs
            self._trace(jobs)
        open_ = self._drain_until is None and not self._closed
        capacity = self._scheduler.capacity() if open_ else Capacity(0, 0)
        self._inbox.show(capacity, self._scheduler.waiting)

    def _put_out(self, results: list[SequenceOutput]) -> None:
        if results:
            self._publish(results)

    def _receive(self, message: Message) -> None:
        if not self.busy:
            self._note_progress()  # otherwise a long idle time would look like a stuck engine
        match message:
            case Sequence():
                if self._drain_until is None:
                    self._scheduler.add(message)
                else:
                    self._put_out([message.hand_back()])
            case JobWriteResult():
                self._apply(message)
            case Drain(until):
                self._drain_until = until
                self._hand_back(self._scheduler.not_started)

    def _apply(self, message: JobWriteResult) -> None:
        """Take a row out of wherever it is; its slot is free at once."""
        sequence = self._scheduler.take(message.job_id, message.attempt)
        if sequence is None:
            return
        self._note_progress()
        self._runner.remove([sequence.uid])
        if message.write_result is WriteResult.FENCED:
            sequence.settle(Outcome.FENCED)
        else:
            self._put_out([sequence.stop(message.write_result)])

    def _end_drain(self) -> None:
        if self._drain_until is not None and time.monotonic() >= self._drain_until and self.busy:
            self._note_progress()
            self._hand_back([*self._scheduler.running.values(), *self._scheduler.waiting])

    def _hand_back(self, sequences: Collection[Sequence]) -> None:
        self._scheduler.give_up(sequences)
        self._runner.remove([sequence.uid for sequence in sequences])
        self._put_out([sequence.hand_back() for sequence in sequences])

    def _load_pieces(self) -> Generator[None, None, ModelRunner]:
        made = self._load()
        if not isinstance(made, Generator):
            return made
        while True:
            try:
                self.load_progress = next(made)
            except StopIteration as end:
                runner: ModelRunner = end.value
                return runner
            self._note_progress()
            yield

    def _read_gauges(self) -> None:
        own = {
            "prefill_chunk_tokens": float(self._scheduler.prefill_budget.tokens),
            "preemptions_total": float(self._scheduler.preemptions),
        }
        self.totals.gauges = self._runner.stats() | own
        self._gauges_due = time.monotonic() + GAUGES_S

    def _note_progress(self) -> None:
        self.progress_at = time.monotonic()


def _free_frames(error: Exception) -> None:
    """Free what was loaded before the error: the exception is kept, and its traceback refers to all local variables."""
    each: BaseException | None = error
    while each is not None:
        clear_frames(each.__traceback__)
        each = each.__cause__ or each.__context__
    release()


def _lone_row_failed(sequence: Sequence, error: Exception) -> SequenceOutput:
    """Fail the only row of a batch that was lost."""
    if isinstance(error, OutOfMemory):
        return row_failed(sequence, error)
    return sequence.fail(JobFailure.ENGINE, "The model failed while it worked on this job.")
