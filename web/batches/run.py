"""Take one batch from validation to its result files.

All state is in the batch's record and folder, so another process can continue at any point. Lines are submitted in
order, and at most `BATCH_LOOKAHEAD` of them are jobs at a time.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict
from itertools import islice
from typing import Final

import redis

from shared.errors import MlxqError, RateLimited, Unavailable
from shared.jobs.store import Jobs
from shared.redis.client import passes
from shared.settings import Settings
from shared.wire import to_json
from web.batches.lines import MAX_LINES, Line, LineInvalid, check_lines, parse_line, raw_lines
from web.batches.requests import LineRequests, Running, expired_result, idempotency_key
from web.batches.results import ERROR, OUTPUT, BatchFolder, Result, Results, merge
from web.batches.store import Batch, BatchError, Batches, BatchStatus, NotLeader
from web.files.store import FileStore, is_disk_full, new_file_id

log = logging.getLogger(__name__)

POLL_S: Final = 0.1
"""Interval of looks at the running jobs. A look at 128 jobs takes about 3 ms."""
_RETRY_S: Final = 1.0
"""Pause while the queue is full, Redis is away or the disk is full."""
_YIELD_ENTRIES: Final = 32
_LINES_PER_CALL: Final = 500
_RUNNING: Final = (BatchStatus.IN_PROGRESS, BatchStatus.CANCELLING)


class BatchRun:
    """One leader's work on one batch.

    Args:
        token: the leader's token.
        leads: whether this process still leads.
        sleep: waits for a number of seconds, or less if the process is to stop.
    """

    def __init__(
        self,
        batch: Batch,
        *,
        settings: Settings,
        batches: Batches,
        files: FileStore,
        jobs: Jobs,
        requests: LineRequests,
        token: str,
        leads: Callable[[], bool],
        sleep: Callable[[float], object],
    ) -> None:
        self._batch = batch
        self._max_line_bytes = settings.max_body_bytes
        self._look_ahead = settings.batch_lookahead
        self._batches = batches
        self._files = files
        self._jobs = jobs
        self._requests = requests
        self._token = token
        self._leads = leads
        self._sleep = sleep
        self._folder = BatchFolder(settings.files_path / "batches", batch.id)
        self._running: dict[int, Running] = {}
        self._unwritten: list[Result] = []
        self._stopped = False
        self._entries = 0
        self._waiting: Line | None = None  # a line that the queue refused for now
        self._refused_until = 0.0
        self._paused = bool(batch.errors)

    def run(self) -> None:
        """Work until the batch has ended.

        Raises:
            NotLeader: this process no longer leads.
            OSError: the folder cannot be read or written.
            redis.RedisError: Redis is unavailable.
        """
        if self._batch.status is BatchStatus.VALIDATING:
            self._validate()
        if self._batch.status in _RUNNING:
            results = Results(self._folder, MAX_LINES, self._token, self._pause)
            try:
                self._run_lines(results)
            finally:
                results.close()
        if self._batch.status is BatchStatus.FINALIZING:
            self._finalize()
        if self._batch.status.terminal:
            self._folder.remove()

    def _validate(self) -> None:
        checked = check_lines(self._folder.input, self._batch.endpoint, self._max_line_bytes, self._pause)
        log.info("batch_validated", extra=self._extra(lines=checked.total, errors=len(checked.errors)))
        counts = to_json({"total": 0 if checked.errors else checked.total})
        if checked.errors:
            errors = to_json([asdict(error) for error in checked.errors])
            self._change(BatchStatus.FAILED, (BatchStatus.VALIDATING,), {"errors": errors, "counts": counts})
        else:
            fields = {"counts": counts, "model": checked.model or ""}
            self._change(BatchStatus.IN_PROGRESS, (BatchStatus.VALIDATING,), fields)

    def _run_lines(self, results: Results) -> None:
        """Run all lines without a result, until all have one, or the batch is cancelled or expires."""
        pending = self._pending(results)
        more = True
        while more or self._running or self._unwritten:
            self._check_leadership()
            stopping = self._is_stopping()
            if stopping:
                more = False
                if not self._stopped:
                    self._stop_jobs(results)
            elif not self._unwritten:  # the disk has space
                more = self._submit(pending)
            self._unwritten += self._ended()
            self._write(results)
            self._sleep(_RETRY_S if self._unwritten else POLL_S)
        self._begin_finalizing(results)

    def _is_stopping(self) -> bool:
        if self._batch.status is BatchStatus.IN_PROGRESS:
            self._batch = self._batches.find(self._batch.id) or self._batch
        return self._batch.status is BatchStatus.CANCELLING or time.time() > self._batch.window_ends_at

    def _pending(self, results: Results) -> Iterator[Line]:
        """Yield the lines without a result, in order."""
        for number, raw in raw_lines(self._folder.input, self._max_line_bytes):
            self._pause()
            if not results.has(number):
                with suppress(LineInvalid):  # the file was checked
                    yield parse_line(number, raw, self._batch.endpoint, self._max_line_bytes)

    def _submit(self, pending: Iterator[Line]) -> bool:
        """Submit as many lines as may run at once; return whether more lines are left."""
        while len(self._running) < self._look_ahead:
            if time.monotonic() < self._refused_until:
                return True
            line = self._waiting or next(pending, None)
            if line is None:
                return False
            try:
                submitted = self._requests.submit(self._batch, line)
            except (RateLimited, Unavailable, redis.RedisError) as error:
                self._wait_with(line, error)
                return True
            self._waiting = None
            if isinstance(submitted, Result):
                self._unwritten.append(submitted)
                if len(self._unwritten) >= self._look_ahead:
                    return True
            else:
                self._running[line.number] = submitted
        return True

    def _wait_with(self, line: Line, error: Exception) -> None:
        """Submit a line again later."""
        if not self._waiting:
            log.info("batch_waits", extra=self._extra(line=line.number, reason=str(error)))
        self._waiting, self._refused_until = line, time.monotonic() + _RETRY_S

    def _ended(self) -> list[Result]:
        """Remove and return the results of lines whose jobs have ended."""
        ended = self._jobs.ended([job_id for running in self._running.values() for job_id in running.job_ids])
        results = []
        for running in [*self._running.values()]:
            if ended.issuperset(running.job_ids):
                results.append(self._requests.result(self._batch, running))
                del self._running[running.line.number]
        return results

    def _write(self, results: Results) -> None:
        """Write results to disk, then delete their jobs. If the disk is full, keep the results and say so."""
        if not self._unwritten:
            return
        self._check_leadership()
        try:
            results.write(self._unwritten)
        except OSError as error:
            if not is_disk_full(error):
                raise
            self._report_full_disk(error)
            return
        counts = {"counts": to_json(asdict(results.counts(self._batch.counts.total)))}
        if self._paused:
            log.info("batch_continues", extra=self._extra())
            counts["errors"] = "[]"
        self._paused = False
        self._change(self._batch.status, (self._batch.status,), counts)
        self._forget(self._unwritten)
        self._unwritten = []

    def _report_full_disk(self, error: OSError) -> None:
        if self._paused:
            return
        log.error("batch_paused", extra=self._extra(reason=str(error)))
        message = "The disk of FILES_DIR is full. The batch continues when there is space."
        errors = to_json([asdict(BatchError("disk_full", message))])
        self._change(self._batch.status, (self._batch.status,), {"errors": errors})
        self._paused = True

    def _forget(self, written: list[Result]) -> None:
        """Delete the jobs of lines whose results are on disk: a batch may have more than Redis has room for."""
        keys = [idempotency_key(self._batch, result.line) for result in written]
        for job_id in self._jobs.find(self._batch.owner, keys):
            if job_id is not None:
                with suppress(MlxqError):
                    self._jobs.forget(job_id, self._batch.owner)

    def _stop_jobs(self, results: Results) -> None:
        """Cancel the jobs of all lines without a result, also those that an earlier leader submitted."""
        self._waiting = None
        pending = self._pending(results)
        while lines := [*islice(pending, _LINES_PER_CALL)]:
            keys = [idempotency_key(self._batch, line.number) for line in lines]
            for line, job_id in zip(lines, self._jobs.find(self._batch.owner, keys), strict=True):
                if job_id is not None and line.number not in self._running:
                    adopted = self._requests.submit(self._batch, line)
                    if isinstance(adopted, Running):
                        self._running[line.number] = adopted
        for running in self._running.values():
            with suppress(MlxqError):  # it has ended
                self._jobs.stop(running.job_ids[0], self._batch.owner)
        self._stopped = True

    def _begin_finalizing(self, results: Results) -> None:
        counts = results.counts(self._batch.counts.total)
        unfinished = counts.completed + counts.failed < counts.total
        end_as = BatchStatus.COMPLETED
        if self._batch.status is BatchStatus.CANCELLING:
            end_as = BatchStatus.CANCELLED
        elif unfinished:
            end_as = BatchStatus.EXPIRED
            self._write_expired(results)
        fields = {
            "counts": to_json(asdict(results.counts(self._batch.counts.total))),
            "end_as": end_as.value,
            "output_id": new_file_id(),
            "error_id": new_file_id(),
        }
        self._change(BatchStatus.FINALIZING, (self._batch.status,), fields)

    def _write_expired(self, results: Results) -> None:
        pending = self._pending(results)
        while lines := [*islice(pending, self._look_ahead)]:
            self._unwritten = [expired_result(self._batch, line) for line in lines]
            while self._unwritten:
                self._write(results)
                if self._unwritten:
                    self._sleep(_RETRY_S)

    def _finalize(self) -> None:
        """Write the result files."""
        while True:
            self._check_leadership()
            try:
                written = self._merge()
                break
            except OSError as error:
                if not is_disk_full(error):
                    raise
                self._report_full_disk(error)
                self._sleep(_RETRY_S)
        fields = {"errors": "[]", **{name: "" for name, exists in written.items() if not exists}}
        self._change(BatchStatus(self._batch.end_as), (BatchStatus.FINALIZING,), fields)
        log.info("batch_ended", extra=self._extra(status=self._batch.status.value))

    def _merge(self) -> Mapping[str, bool]:
        """Write and commit the result files; return which of them exist, by record field."""
        names = {OUTPUT: ("output_id", "output"), ERROR: ("error_id", "error")}
        partials = {kind: self._files.begin(self._batch.owner) for kind in names}
        try:
            merge(self._folder, MAX_LINES, partials, self._pause)
            self._check_leadership()
            for kind, (field, name) in names.items():
                file_id = str(getattr(self._batch, field))
                if partials[kind].bytes:
                    filename = f"{self._batch.id}_{name}.jsonl"
                    file = self._files.describe(
                        partials[kind],
                        self._batch.owner,
                        filename,
                        "batch_output",
                        file_id,
                        self._batch.output_lifetime_s,
                    )
                    self._files.commit(partials[kind], file)
        finally:
            for partial in partials.values():
                partial.discard()
        return {field: partials[kind].bytes > 0 for kind, (field, _) in names.items()}

    def _change(self, status: BatchStatus, allowed: tuple[BatchStatus, ...], fields: Mapping[str, str]) -> None:
        """Change the record. If its status is another one by now, for example `cancelling`, use the latter."""
        changed = self._batches.change(self._batch.id, status, allowed, self._token, fields)
        latest = changed or self._batches.find(self._batch.id)
        if latest is None:  # a record never disappears before its batch has ended
            raise NotLeader
        self._batch = latest

    def _pause(self) -> None:
        """Let the process do other things while a large file is read."""
        self._entries += 1
        if self._entries % _YIELD_ENTRIES == 0:
            self._check_leadership()
            self._sleep(0)

    def _check_leadership(self) -> None:
        if not self._leads():
            raise NotLeader

    def _extra(self, **fields: object) -> dict[str, object]:
        return {"batch_id": self._batch.id, **fields}


def is_transient(error: Exception) -> bool:
    """Whether the run of a batch failed only for now."""
    return isinstance(error, redis.RedisError) and passes(error)
