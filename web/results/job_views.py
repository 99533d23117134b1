"""Render jobs as the responses that their owners get."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from types import MappingProxyType
from typing import Any, Final, cast

from shared.jobs.log import JobLog
from shared.jobs.record import Attempt, Job, Status
from shared.jobs.request import GENERATE
from shared.jobs.store import Accepted, Jobs, Place
from web.cluster.snapshot import Cluster
from web.http.threadpool import run_in_threadpool
from web.parsing.parse import field_of, parse
from web.results import logprobs
from web.results.messages import read_message
from web.schemas.jobs import (
    AttemptView,
    InferenceView,
    JobError,
    JobView,
    MessageView,
    Output,
    SamplingView,
    Timings,
    Urls,
    Usage,
)
from web.schemas.requests import PriorityName

MESSAGE: Final = "message"
"""The value of `parse` whose result does not depend on the text alone."""
_NONE: Final[Mapping[str, str | None]] = MappingProxyType({})


class JobViews:
    """Renders jobs, together with what their records do not contain: queue position, text, start estimate."""

    def __init__(self, jobs: Jobs, cluster: Cluster, log: JobLog) -> None:
        self._jobs = jobs
        self._cluster = cluster
        self._log = log

    def job_json(self, job: Job) -> str:
        """Return a job with its text so far, as the JSON of a `JobView`."""
        return self._job_json(job, self._jobs.places([job]).get(job.id))

    def archived_json(self, job: Job, text: str | None) -> str:
        """Return a job from the archive. Its log no longer exists, so there are no log-probabilities."""
        return self._view(job, _output(job, text), None).model_dump_json()

    def accepted_json(self, accepted: Accepted) -> str:
        """Return a job that was just accepted. Its queue position is already known."""
        return self._job_json(accepted.job, accepted.place)

    def list_items(self, jobs: Sequence[Job], archived: Mapping[str, str | None] = _NONE) -> list[JobView]:
        """Return jobs as a list shows them: only ended jobs have their text.

        Args:
            archived: texts of the jobs from the archive, by id.
        """
        places = self._jobs.places(jobs)
        # Results of inputs are large.
        ended = [job for job in jobs if job.status.terminal and not job.archived and job.kind == GENERATE]
        texts: dict[str, str | None] = dict(zip((job.id for job in ended), self._jobs.texts(ended), strict=True))
        texts |= archived
        return [
            self._view(job, _output(job, texts.get(job.id)), places.get(job.id), with_message=False) for job in jobs
        ]

    def inference_json(self, job: Job) -> str:
        """Return the result of a job that succeeded, as the JSON of an `InferenceView`."""
        text = self._jobs.text(job)
        view = InferenceView(
            id=job.id,
            model=job.model,
            adapter=job.adapter or None,
            text=text,
            finish_reason=job.finish_reason,
            usage=_usage(job),
            sampling=_sampling(job),
            timings=Timings(**job.timings),
            **self._parsed(job, text),
        )
        return logprobs.to_json(view, job, self._log)

    def _job_json(self, job: Job, place: Place | None) -> str:
        return logprobs.to_json(self._view(job, self._output(job), place), job, self._log)

    def _output(self, job: Job) -> Output | None:
        # A job before its first attempt has no text. Not reading it saves a round trip per submission.
        untouched = job.status is Status.QUEUED and job.attempt == 0
        return _output(job, "" if untouched else self._jobs.text(job))

    def _view(self, job: Job, output: Output | None, place: Place | None, *, with_message: bool = True) -> JobView:
        return JobView(
            id=job.id,
            status=job.status,
            key_id=job.owner,
            model=job.model,
            adapter=job.adapter or None,
            kind=job.kind,
            attempt=job.attempt,
            history=[_attempt_view(attempt) for attempt in job.history],
            priority=cast("PriorityName", job.priority.label),
            created_at=job.created_at,
            started_at=job.started_at,
            finished_at=job.finished_at,
            last_event=job.last_event,
            queue_position=place.position if place else None,
            estimated_start_s=self._estimated_start_s(job, place),
            output=output,
            usage=_usage(job),
            sampling=_sampling(job),
            timings=Timings(**job.timings),
            error=JobError(code=job.error_code, message=job.error_message or "") if job.error_code else None,
            metadata=job.metadata,
            children=list(job.children),
            archived=job.archived,
            urls=urls(job.id),
            **self._parsed(job, output.text if output and job.status.terminal else None, with_message=with_message),
        )

    def _estimated_start_s(self, job: Job, place: Place | None) -> float | None:
        return self._cluster.snapshot().estimated_start_s(job.model, place, job.priority) if place else None

    def _parsed(self, job: Job, text: str | None, *, with_message: bool = True) -> dict[str, Any]:
        """Return the fields of `Parsed` if the job requested them; they are None until its text is complete."""
        if job.parsing is None:
            return {}
        if job.parsing.format == MESSAGE:
            return {"message": self._message(job) if text is not None and with_message else None}
        field = field_of(job.parsing.format)
        if text is None or field is None:
            return {field or "actions": None, "parse_error": None}
        card, parsing = self._cluster.snapshot().models.get(job.model), job.parsing
        found, error = run_in_threadpool(len(text), lambda: parse(text, parsing, card))
        return {field: [asdict(each) for each in found], "parse_error": error}

    def _message(self, job: Job) -> MessageView | None:
        reader = None if job.archived else read_message(job, self._log)
        return None if reader is None else MessageView.model_validate(reader.to_dict())


def urls(job_id: str) -> Urls:
    """Return the paths of a job."""
    path = f"/v1/jobs/{job_id}"
    return Urls(self=path, stream=f"{path}/stream", cancel=f"{path}/cancel")


def _output(job: Job, text: str | None) -> Output | None:
    return None if text is None else Output(text=text, finish_reason=job.finish_reason)


def _attempt_view(attempt: Attempt) -> AttemptView:
    return AttemptView(
        attempt=attempt.number,
        # Hashed, because a worker's id contains a host name that clients must not see.
        worker=hashlib.blake2b(attempt.worker.encode(), digest_size=4).hexdigest(),
        started_at=attempt.started_at,
        ended_at=attempt.ended_at,
        outcome=attempt.how,
    )


def _sampling(job: Job) -> SamplingView | None:
    if job.sampling is None:
        return None
    known = {name: job.sampling[name] for name in SamplingView.model_fields}
    return SamplingView.model_validate(known)


def _usage(job: Job) -> Usage:
    return Usage(
        prompt_tokens=job.prompt_tokens,
        completion_tokens=job.completion_tokens,
        cached_tokens=job.cached_tokens,
        reasoning_tokens=job.reasoning_tokens,
    )
