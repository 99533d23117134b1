"""Jobs as their owners see them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, cast

from shared.errors import Gone
from shared.jobs.attempts import Attempt
from shared.jobs.record import Job, Status
from shared.jobs.store import Jobs
from web import ui_tars
from web.cluster import Roster
from web.schemas import (
    ActionView,
    AttemptView,
    InferenceView,
    JobError,
    JobView,
    Output,
    PriorityName,
    Timings,
    Urls,
    Usage,
)


class Views:
    """Makes views of jobs, with what only Redis knows: place in line, text so far."""

    def __init__(self, jobs: Jobs, roster: Roster) -> None:
        self._jobs = jobs
        self._roster = roster

    def full(self, job: Job) -> JobView:
        """A job with its text so far."""
        return self._view(job, self._output(job), self._jobs.position(job))

    def brief(self, jobs: Sequence[Job]) -> list[JobView]:
        """Jobs as a list shows them: with their texts only when they have ended."""
        positions = self._jobs.positions(jobs)
        return [self._view(job, _output_in_all(job), positions.get(job.id)) for job in jobs]

    def _output(self, job: Job) -> Output | None:
        # A job that waits for its first attempt has none, and asking for it would cost a round trip a submit.
        if job.status is Status.QUEUED and job.attempt == 0:
            return Output(text="", finish_reason=None)
        try:
            return Output(text=self._jobs.text(job), finish_reason=job.finish_reason)
        except Gone:  # a text with a hole in it would be taken for the whole
            return None

    def _view(self, job: Job, output: Output | None, position: int | None) -> JobView:
        return JobView(
            id=job.id,
            status=job.status,
            model=job.model,
            attempt=job.attempt,
            history=[_attempt(each) for each in job.history],
            priority=cast("PriorityName", job.priority.label),
            created_at=job.created_at,
            started_at=job.started_at,
            finished_at=job.finished_at,
            queue_position=position,
            estimated_start_s=self._roster.now().estimated_start_s(job.model, position) if position else None,
            output=output,
            usage=usage(job),
            timings=Timings(**job.timings),
            error=JobError(code=job.error_code, message=job.error_message or "") if job.error_code else None,
            metadata=job.metadata,
            urls=urls(job.id),
            **self._parsed(job, output.text if output and job.status.terminal else None),
        )

    def answer(self, job: Job) -> InferenceView:
        """A job that succeeded, as the answer to its request."""
        return InferenceView(
            id=job.id,
            model=job.model,
            text=job.text or "",
            finish_reason=job.finish_reason,
            usage=usage(job),
            timings=Timings(**job.timings),
            **self._parsed(job, job.text or ""),
        )

    def _parsed(self, job: Job, text: str | None) -> dict[str, Any]:
        """The fields of `Parsed`, where they were asked for and the text is there."""
        if job.generation.parse is None or text is None:
            return {}
        card = self._roster.now().models.get(job.model)
        images = job.generation.image_parts
        size = (images[-1]["width"], images[-1]["height"]) if images else None
        actions, fault = ui_tars.parse(text, size, card.geometry if card else None)
        return {"actions": [ActionView(**asdict(action)) for action in actions], "parse_error": fault}


def _output_in_all(job: Job) -> Output | None:
    return None if job.text is None else Output(text=job.text, finish_reason=job.finish_reason)


def _attempt(attempt: Attempt) -> AttemptView:
    return AttemptView(
        attempt=attempt.number,
        # A worker's id has the name of its host, which is not the callers' business.
        worker=hashlib.blake2b(attempt.worker.encode(), digest_size=4).hexdigest(),
        started_at=attempt.started_at,
        ended_at=attempt.ended_at,
        outcome=attempt.how,
    )


def usage(job: Job) -> Usage:
    """A job's token counts."""
    return Usage(
        prompt_tokens=job.prompt_tokens,
        completion_tokens=job.completion_tokens,
        cached_tokens=job.cached_tokens,
    )


def urls(job_id: str) -> Urls:
    """Where a job is found."""
    own = f"/v1/jobs/{job_id}"
    return Urls(self=own, stream=f"{own}/stream", cancel=f"{own}/cancel")
