"""The numbered events of a response, as a function of its request and its job's log.

Any process can compute them again at any time, with the same numbers: that is why a stream can be resumed after every
event, whatever has died since.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from shared.jobs.log import Event, EventKind
from shared.jobs.record import Job, Status
from web.responses.output import Output, Shown, StreamEvent
from web.responses.view import ResponseStatus, ResponseView, is_cut, status_of, view


class ResponseEvents:
    """Turns the events of a job's log, from the first on, into those of its response.

    Args:
        job: the record, in any state; what does not change is read from it.
        echoed: see `web.responses.view.echoed_fields`.

    Attributes:
        next_number: sequence number of the next event.
        final: the response, once it has ended.
    """

    def __init__(self, job: Job, echoed: Mapping[str, Any], shown: Shown) -> None:
        self.next_number = 0
        self.final: ResponseView | None = None
        self._job = job
        self._echoed = echoed
        self._output = Output(job, shown)

    def of(self, events: Iterable[Event], latest: Job) -> list[StreamEvent]:
        """Return the response's events for the next events of the log.

        Args:
            latest: the job's record; that of the ended job if `done` is among the events.
        """
        return [self._numbered(each) for event in events for each in self._translated(event, latest)]

    def _numbered(self, event: StreamEvent) -> StreamEvent:
        number, self.next_number = self.next_number, self.next_number + 1
        return {**event, "sequence_number": number}

    def _translated(self, event: Event, latest: Job) -> Iterator[StreamEvent]:
        match event.kind:
            case EventKind.QUEUED if event.n == 1:
                yield self._state("created", "queued" if self._echoed["background"] else "in_progress")
                if self._echoed["background"]:
                    yield self._state("queued", "queued")
            case EventKind.STARTED:
                yield self._state("in_progress", "in_progress")
            case EventKind.CHUNK:
                yield from self._output.add(json.loads(event.data))
            case EventKind.DONE:
                yield from self._end(latest)

    def _state(self, name: str, status: ResponseStatus) -> StreamEvent:
        response = view(self._job, self._echoed, status, ())
        return {"type": f"response.{name}", "response": response.model_dump()}

    def _end(self, job: Job) -> Iterator[StreamEvent]:
        status = status_of(job)
        yield from self._output.end("completed" if status == "completed" else "incomplete")
        self.final = view(job, self._echoed, status, self._output.items)
        # There is no event for a cancelled response; its status says that it was cancelled.
        name = "incomplete" if is_cut(job) or job.status is Status.CANCELLED else status
        yield {"type": f"response.{name}", "response": self.final.model_dump()}
