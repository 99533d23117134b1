"""The engine of one model. Each step receives messages, schedules, executes and publishes.

The engine knows nothing of Redis. The claimer submits sequences, any thread may pass on write results (cancelled,
expired, fenced), and the publisher takes the output of rows. `worker.engine.engine` decides when to step.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future
from typing import TypeAlias

from shared.errors import JobFailure
from shared.queue.claims import WriteResult
from worker.engine.inbox import Drain, ErasePrefixes, Inbox, JobWriteResult, Message
from worker.engine.loading import Loading
from worker.engine.meters import ModelClock, Totals
from worker.engine.output import OutputProcessor, publish_results, row_failed
from worker.engine.scheduler import Capacity, Schedule, Scheduler
from worker.engine.sequence import Outcome, Sequence, SequenceOutput
from worker.runner.base import ModelRunner, OutOfMemory, RunnerLoader, StepOutput

logger = logging.getLogger(__name__)

Trace: TypeAlias = Callable[[list[str]], object]


class EngineCore:
    """The engine of one model.

    Any thread may call `submit`, `apply_write_result`, `erase_prefixes`, `drain`, `capacity` and `waiting`, and read
    the properties. All other methods belong to the engine thread.

    Args:
        load: loads the runner, see `worker.engine.loading`.
        slots: maximum rows in the batch.
        publish: takes the output of sequences to be written; must not block.
        wake: called when there is work.
        trace: called with the ids of the jobs in the batch, before the step, whenever they change.
        reserve: number of rows that jobs of the class `batch` leave free.

    Attributes:
        clock: stands still while the engine thread works for other models.
        progress_at: monotonic moment of the last progress, such as a token, prefilled tokens or the end of a row.
        used_at: monotonic moment at which a sequence was last submitted.
        charged_s: seconds of the engine thread charged to this model, kept by `worker.engine.engine`.
    """

    def __init__(
        self,
        load: RunnerLoader,
        slots: int,
        publish: Callable[[list[SequenceOutput]], object],
        wake: Callable[[], object] = lambda: None,
        trace: Trace = lambda _job_ids: None,
        reserve: int = 0,
    ) -> None:
        self.progress_at = self.used_at = time.monotonic()
        self.charged_s = 0.0
        self.clock = ModelClock()
        self.totals = Totals()
        self._loading = Loading(load)
        self._slots = slots
        self._reserve = reserve
        self._publish = publish
        self._inbox = Inbox(wake)
        self._trace = trace
        self._traced: list[str] = []
        self._drain_until: float | None = None
        self._version = -1
        self._shared_scheduler: Scheduler | None = None  # for other threads; None before and after
        self._closed = self._blocked_on_memory = False

    @property
    def loaded(self) -> Future[ModelRunner]:
        """The warm runner, or why there is none: `worker.engine.loading.Unloaded` after the end."""
        return self._loading.result

    @property
    def load_progress(self) -> float:
        """Progress of the loading, 0 to 1."""
        return self._loading.progress

    @property
    def runner(self) -> ModelRunner:
        """The loaded model."""
        return self._runner

    @property
    def slots_used(self) -> int:
        """Rows in the batch."""
        scheduler = self._shared_scheduler
        return 0 if scheduler is None else len(scheduler.running)

    @property
    def busy(self) -> bool:
        """Whether there is any row, running or waiting."""
        scheduler = self._shared_scheduler
        return scheduler is not None and scheduler.busy

    @property
    def idle(self) -> bool:
        """Whether a step would do nothing; also if all rows wait for a higher memory limit."""
        return (self._blocked_on_memory or not self.busy) and self._inbox.empty

    def submit(self, sequence: Sequence) -> None:
        """Generate for a sequence as soon as it fits. After the model is unloaded it is handed back at once."""
        self.used_at = time.monotonic()
        self._inbox.put(sequence)
        if self._closed:  # the engine thread may not have seen it; whichever thread receives it settles it
            for message in self._inbox.receive():
                if isinstance(message, Sequence):
                    message.settle(Outcome.HANDED_BACK)

    def apply_write_result(self, job_id: str, attempt: int, write_result: WriteResult) -> None:
        """Stop a job if Redis says so. Ignores jobs that are not here."""
        if write_result is not WriteResult.OK:
            self._inbox.put(JobWriteResult(job_id, attempt, write_result))

    def erase_prefixes(self, cutoffs: Mapping[str, float]) -> None:
        """Drop the cached prefixes of owners that were not used after a time, by owner, before the next step."""
        self._inbox.put(ErasePrefixes(cutoffs))

    def drain(self, seconds: float) -> None:
        """Accept no more rows; hand back waiting rows at once, and rows that still run after `seconds`."""
        self._inbox.put(Drain(time.monotonic() + seconds))

    def capacity(self) -> Capacity:
        """Return what could be admitted in addition to the submitted sequences; nothing before the model is loaded."""
        return self._inbox.capacity()

    def waiting(self) -> list[str]:
        """Return the ids of submitted jobs that were never in the batch, in the order of admission."""
        return self._inbox.waiting()

    def loading(self) -> Iterator[None]:
        """Load the runner, one piece per iteration; `loaded` then has the result."""
        return self._loading.pieces(self._note_progress, self._on_loaded)

    def load(self) -> None:
        """Load the runner at once."""
        for _ in self.loading():
            pass

    def close(self) -> None:
        """Unload: hand back all rows, store prefixes for the next worker, and free the model."""
        self._closed = True
        for message in self._inbox.receive():
            self._receive(message)
        self._hand_back([*self._scheduler.running.values(), *self._scheduler.waiting])
        self._refresh()
        self._runner.close()
        self._shared_scheduler = None
        del self._runner, self._scheduler, self._output_processor
        self._loading.unload()

    def set_cache_limit(self, limit_bytes: int, future_limit_bytes: int = 0) -> None:
        """Set the memory for caches, see `Scheduler.set_memory_limit`. Rows that waited for memory may fit now."""
        self._blocked_on_memory = False
        self._scheduler.set_memory_limit(limit_bytes, future_limit_bytes)
        self._refresh()

    def read_gauges(self) -> float:
        """Read the gauges if they are due; return the seconds until they are due again."""
        return self.totals.read_gauges(self._runner, self._scheduler)

    def step(self) -> None:
        """Receive, schedule, execute, publish."""
        for message in self._inbox.receive():
            self._receive(message)
        schedule = self._scheduler.schedule()
        self._emit([row_failed(*each) for each in schedule.failed])
        self._emit([row.start() for row in schedule.insert if not row.started])
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

    def _on_loaded(self, runner: ModelRunner) -> None:
        self._runner = runner
        self._scheduler = Scheduler(runner, self._slots, self.clock, self._reserve)
        self._output_processor = OutputProcessor(runner.eos, runner.detokenizer)
        self.read_gauges()
        self._shared_scheduler = self._scheduler
        self._refresh()
        self._note_progress()

    def _execute(self, schedule: Schedule) -> StepOutput | None:
        """Change the batch, then run one step of it; None if the batch is empty."""
        self._blocked_on_memory = not self._scheduler.running and self.busy and self._drain_until is None
        if schedule.remove:
            self._runner.remove(schedule.remove)
        if schedule.insert:
            self._runner.insert([sequence.row() for sequence in schedule.insert])
        if not self._scheduler.running:
            return None
        plan = self._scheduler.plan(self._runner.prefillable(), self._runner.next_image_s())
        return self._runner.execute(plan)

    def _update(self, output: StepOutput) -> None:
        """Free the slots of rows that ended in a step, then publish its output."""
        rows = self._scheduler.running
        results = [row_failed(*each) for each in self._scheduler.update(output)]
        results += self._output_processor.process(rows, output.tokens)
        results += publish_results(rows, output.results)
        self.totals.count(output, self._output_processor.tokens, rows)
        ended = [result.sequence for result in results if result.outcome and result.sequence.uid in rows]
        for sequence in ended:
            self._scheduler.finish(sequence)
        leaving = [sequence.uid for sequence in ended]
        if output.tokens or output.results:
            leaving += self._scheduler.clear_suspect()
        if leaving:
            self._runner.remove(leaving)
        if output.tokens or output.prompt_tokens or output.prefilled or output.failed or output.out_of_memory:
            self._note_progress()  # a step without any result is no progress
        self._emit(results)

    def _recover(self, error: Exception) -> None:
        """Handle the loss of the batch; see `worker.engine.scheduler`."""
        self._note_progress()
        logger.error("step_failed", exc_info=error, extra={"rows": len(self._scheduler.running)})
        self._runner.reset()
        self._emit([_single_row_failed(*each) for each in self._scheduler.recover(error)])

    def _refresh(self) -> None:
        """Report a changed batch to the prefix cache, the breadcrumb and other threads."""
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
        self._inbox.set_snapshot(capacity, self._scheduler.waiting)

    def _emit(self, outputs: list[SequenceOutput]) -> None:
        if not outputs:
            return
        for output in outputs:
            if output.started:
                self.totals.latencies.started(output.sequence)
            if output.ending is not None:
                self.totals.latencies.ended(output)
        self._publish(outputs)

    def _receive(self, message: Message) -> None:
        if not self.busy:
            self._note_progress()  # otherwise a long idle time would look like a stuck engine
        match message:
            case Sequence():
                if self._drain_until is None:
                    self._scheduler.add(message)
                else:
                    self._emit([message.hand_back()])
            case JobWriteResult():
                self._stop_row(message)
            case Drain(until):
                self._drain_until = until
                self._hand_back(self._scheduler.not_started)
            case ErasePrefixes(cutoffs):
                self._runner.erase_prefixes(cutoffs)

    def _stop_row(self, message: JobWriteResult) -> None:
        """Remove a row, whether it runs or waits; its slot is free at once."""
        sequence = self._scheduler.remove(message.job_id, message.attempt)
        if sequence is None:
            return
        self._note_progress()
        self._runner.remove([sequence.uid])
        if message.write_result is WriteResult.FENCED:
            sequence.settle(Outcome.FENCED)
        else:
            self._emit([sequence.stop(message.write_result)])

    def _end_drain(self) -> None:
        if self._drain_until is not None and time.monotonic() >= self._drain_until and self.busy:
            self._note_progress()
            self._hand_back([*self._scheduler.running.values(), *self._scheduler.waiting])

    def _hand_back(self, sequences: Collection[Sequence]) -> None:
        self._scheduler.drop(sequences)
        self._runner.remove([sequence.uid for sequence in sequences])
        self._emit([sequence.hand_back() for sequence in sequences])

    def _note_progress(self) -> None:
        self.progress_at = time.monotonic()


def _single_row_failed(sequence: Sequence, error: Exception) -> SequenceOutput:
    """Fail the only row of a batch that was lost."""
    if isinstance(error, OutOfMemory):
        return row_failed(sequence, error)
    return sequence.fail(JobFailure.ENGINE, "The model failed while it worked on this job.")
