"""Jobs as their owners see them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Final, cast

from shared.jobs.log import JobLog
from shared.jobs.record import Attempt, Job, Status
from shared.jobs.store import Accepted, Jobs
from web.cluster.snapshot import Cluster
from web.results import logprobs, ui_tars
from web.schemas.jobs import ActionView, AttemptView, InferenceView, JobError, JobView, Output, Timings, Urls, Usage
from web.schemas.requests import PriorityName

UI_TARS: Final = "ui_tars"
"""The one format of answers that is parsed."""


class Views:
    """Makes views of jobs, with what only Redis knows: position in the queue, text so far."""

    def __init__(self, jobs: Jobs, cluster: Cluster, log: JobLog) -> None:
        self._jobs = jobs
        self._cluster = cluster
        self._log = log

    def full(self, job: Job) -> str:
        """A job with its text so far, as the JSON of a `JobView`."""
        return self._whole(job, self._jobs.position(job))

    def accepted(self, accepted: Accepted) -> str:
        """A job as it was accepted: what the acceptance said needs no further call."""
        return self._whole(accepted.job, accepted.position)

    def brief(self, jobs: Sequence[Job]) -> list[JobView]:
        """Jobs as a list shows them: with their texts only when they have ended."""
        positions = self._jobs.positions(jobs)
        ended = [job for job in jobs if job.status.terminal]
        texts = dict(zip((job.id for job in ended), self._jobs.texts(ended), strict=True))
        return [self._view(job, _output(job, texts.get(job.id)), positions.get(job.id)) for job in jobs]

    def _whole(self, job: Job, position: int | None) -> str:
        return logprobs.to_json(self._view(job, self._output(job), position), job, self._log)

    def _output(self, job: Job) -> Output | None:
        # A job that waits for its first attempt has no text, and asking for it would cost a round trip a submit.
        first = job.status is Status.QUEUED and job.attempt == 0
        return _output(job, "" if first else self._jobs.text(job))

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
            estimated_start_s=self._cluster.now().estimated_start_s(job.model, position) if position else None,
            output=output,
            usage=usage(job),
            timings=Timings(**job.timings),
            error=JobError(code=job.error_code, message=job.error_message or "") if job.error_code else None,
            metadata=job.metadata,
            urls=urls(job.id),
            **self._parsed(job, output.text if output and job.status.terminal else None),
        )

    def answer(self, job: Job) -> str:
        """A job that succeeded, as the answer to its request: the JSON of an `InferenceView`."""
        text = self._jobs.text(job)
        view = InferenceView(
            id=job.id,
            model=job.model,
            text=text,
            finish_reason=job.finish_reason,
            usage=usage(job),
            timings=Timings(**job.timings),
            **self._parsed(job, text),
        )
        return logprobs.to_json(view, job, self._log)

    def _parsed(self, job: Job, text: str | None) -> dict[str, Any]:
        """The fields of `Parsed`, where they were asked for and the text is there."""
        if text is None or job.parsing is None or job.parsing.format != UI_TARS:  # a newer version's format, say
            return {}
        card = self._cluster.now().models.get(job.model)
        actions, fault = ui_tars.parse(text, job.parsing.image_size, card.geometry if card else None)
        return {"actions": [ActionView(**asdict(action)) for action in actions], "parse_error": fault}


def _output(job: Job, text: str | None) -> Output | None:
    return None if text is None else Output(text=text, finish_reason=job.finish_reason)


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
