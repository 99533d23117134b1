"""Spans of jobs: the wait in the queue, each attempt, and its prefill and decode.

All of them are made when an attempt ends, from times that are measured anyway, so that a token costs nothing. A worker
that dies sends none for its attempt. The next worker knows that attempt from the job's record, and sends its span.
Span ids are derived from the job and the attempt's number, so each attempt can link to those before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from shared.jobs.record import Attempt, AttemptEnd, EndedJob, Ending, Job, Status
from shared.jobs.request import EMBED, GENERATE, Request
from shared.queue.claims import ClaimedJob
from shared.tracing import TraceParent, Tracer, nanoseconds, span_id

if TYPE_CHECKING:
    from opentelemetry.trace import Link, Span

_LOST: Final = "worker_lost"


class Stages(NamedTuple):
    """When the stages of an attempt began, in seconds since the epoch by one clock; None for those that did not.

    Attributes:
        created: acceptance of the job.
    """

    created: float
    ended: float
    admitted: float | None = None
    prefilled: float | None = None
    first_token: float | None = None


class JobSpans:
    """Sends the spans of jobs that belong to a trace.

    Args:
        tracer: None to send nothing.
        worker: name of this process.
    """

    def __init__(self, tracer: Tracer | None, worker: str) -> None:
        self._tracer = tracer
        self._worker = worker

    @property
    def enabled(self) -> bool:
        """Whether spans are sent."""
        return self._tracer is not None

    def attempt_ended(self, claimed: ClaimedJob, stages: Stages, ending: Ending | None) -> None:
        """Send the spans of an attempt of this process, and of attempts before it whose workers died.

        Args:
            ending: how the job ended; None if it was handed back.
        """
        job = claimed.job
        parent = TraceParent.parse(job.traceparent, job.tracestate)
        if self._tracer is None or parent is None:
            return
        spans = _Spans(self._tracer, parent, job, _operation(claimed.request), stages.created - job.created_at)
        spans.lost_attempts(job.attempt)
        if stages.admitted is None:
            spans.queue(job.attempt, stages.ended, (ending.error_code or ending.status.value) if ending else None)
        else:
            spans.queue(job.attempt, stages.admitted)
            attributes = _request_attributes(claimed.request) | _usage(ending) | {"mlxq.worker": self._worker}
            attempt = spans.attempt(job.attempt, stages.admitted, attributes)
            spans.stages(job.attempt, stages)
            if stages.first_token is not None:
                attempt.set_attribute("gen_ai.response.time_to_first_chunk", stages.first_token - stages.created)
                attempt.add_event("first token", timestamp=nanoseconds(stages.first_token))
            error = ending.error_code if ending else None
            _end(attempt, stages.ended, error, AttemptEnd.ENDED if ending else AttemptEnd.HANDED_BACK)

    def ended_without_worker(self, job: Job, end: EndedJob) -> None:
        """Send the spans of a job that ended while it was queued, or because its worker crashed."""
        parent = TraceParent.parse(job.traceparent, job.tracestate)
        if self._tracer is None or parent is None or job.finished_at is None:
            return
        spans = _Spans(self._tracer, parent, job, "generate_content", 0.0)
        spans.lost_attempts(job.attempt + 1)
        if end.error_code != _LOST:
            spans.queue(job.attempt + 1, job.finished_at, end.error_code or end.status.value)


class _Spans:
    """Makes the spans of one job.

    Args:
        offset_s: from Redis's clock to that of this process.
    """

    def __init__(self, tracer: Tracer, parent: TraceParent, job: Job, operation: str, offset_s: float) -> None:
        self._tracer = tracer
        self._parent = parent
        self._job = job
        self._operation = operation
        self._offset_s = offset_s

    def queue(self, number: int, end_s: float, error: str | None = None) -> None:
        """Send the span of the wait before an attempt."""
        since_s = max((each.ended_at or 0.0 for each in self._before(number)), default=self._job.created_at)
        span = self._start("queue", number, "queue", since_s + self._offset_s, self._parent)
        _end(span, end_s, error)

    def attempt(self, number: int, start_s: float, attributes: dict[str, Any]) -> Span:
        """Start the span of an attempt, linked to those before it."""
        return self._start(
            f"{self._operation} {self._job.model}", number, "attempt", start_s, self._parent, attributes,
            [self._link(each) for each in self._before(number)],
        )  # fmt: skip

    def stages(self, number: int, stages: Stages) -> None:
        """Send the spans of an attempt's prefill and decode."""
        parent = self._parent._replace(span_id=span_id(self._job.id, number, "attempt"))
        if stages.admitted is not None:
            prefilled = stages.ended if stages.prefilled is None else stages.prefilled
            _end(self._start("prefill", number, "prefill", stages.admitted, parent), prefilled)
        if stages.prefilled is not None:
            _end(self._start("decode", number, "decode", stages.prefilled, parent), stages.ended)

    def lost_attempts(self, number: int) -> None:
        """Send the spans of the attempts directly before one whose workers died, and of the waits before them."""
        lost = takewhile(lambda each: each.how is AttemptEnd.WORKER_LOST, reversed(self._before(number)))
        for each in lost:
            start_s, end_s = each.started_at + self._offset_s, (each.ended_at or 0.0) + self._offset_s
            self.queue(each.number, start_s)
            span = self.attempt(each.number, start_s, {"mlxq.worker": each.worker.partition("/")[0]})
            _end(span, end_s, _LOST, AttemptEnd.WORKER_LOST)

    def _before(self, number: int) -> Sequence[Attempt]:
        return [each for each in self._job.history if each.number < number and each.ended_at is not None]

    def _link(self, attempt: Attempt) -> Link:
        from opentelemetry.trace import Link

        context = self._parent._replace(span_id=span_id(self._job.id, attempt.number, "attempt")).context()
        return Link(context, {"mlxq.attempt": attempt.number, "mlxq.attempt.outcome": attempt.how or ""})

    def _start(
        self,
        name: str,
        number: int,
        kind: str,
        start_s: float,
        parent: TraceParent,
        attributes: dict[str, Any] | None = None,
        links: Sequence[Link] = (),
    ) -> Span:
        of_job = {
            "gen_ai.operation.name": self._operation,
            "gen_ai.provider.name": "mlxq",
            "gen_ai.request.model": self._job.model,
            "gen_ai.response.model": self._job.model,
            "gen_ai.response.id": self._job.id,
            "mlxq.attempt": number,
            "mlxq.priority": self._job.priority.label,
            "mlxq.request_id": self._job.request_id,
        }
        return self._tracer.start(
            name,
            parent,
            attributes=of_job | (attributes or {}),
            links=links,
            start_s=start_s,
            id_=span_id(self._job.id, number, kind),
        )


def _operation(request: Request) -> str:
    """Return the operation by OpenTelemetry's names, which have none for reranking."""
    if request.kind != GENERATE:
        return {EMBED: "embeddings"}.get(request.kind, request.kind)
    return "text_completion" if request.messages is None else "chat"


def _request_attributes(request: Request) -> dict[str, Any]:
    """Return the parameters of the request, without its text."""
    if request.kind != GENERATE:
        return {} if request.dimensions is None else {"gen_ai.embeddings.dimension.count": request.dimensions}
    sampling = request.sampling
    return {
        "gen_ai.request.max_tokens": request.max_tokens,
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.request.top_k": sampling.top_k,
        "gen_ai.request.frequency_penalty": sampling.frequency_penalty,
        "gen_ai.request.presence_penalty": sampling.presence_penalty,
        "gen_ai.request.seed": sampling.seed,
        "gen_ai.output.type": "json" if request.constraint and request.constraint.kind == "json_schema" else "text",
    }


def _usage(ending: Ending | None) -> dict[str, Any]:
    if ending is None:
        return {}
    return {
        "gen_ai.usage.input_tokens": ending.prompt_tokens,
        "gen_ai.usage.output_tokens": ending.completion_tokens,
        "gen_ai.usage.cache_read.input_tokens": ending.cached_tokens,
        "gen_ai.usage.reasoning.output_tokens": ending.reasoning_tokens,
        "gen_ai.response.finish_reasons": [ending.finish_reason] if ending.finish_reason else None,
        "mlxq.job.status": ending.status.value,
    }


def _end(span: Span, end_s: float, error: str | None = None, outcome: AttemptEnd | None = None) -> None:
    from opentelemetry.trace import Status as SpanStatus
    from opentelemetry.trace import StatusCode

    if outcome is not None:
        span.set_attribute("mlxq.attempt.outcome", outcome.value)
    if error in (Status.CANCELLED, Status.EXPIRED):
        span.set_attribute("mlxq.job.status", error)
    elif error:
        span.set_attribute("error.type", error)
        span.set_status(SpanStatus(StatusCode.ERROR))
    span.end(nanoseconds(end_s))
