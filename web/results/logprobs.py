"""The log-probabilities of an ended job's tokens, put together from its log.

They may be many megabytes of JSON, so they are read page by page, rewritten in threads, and never made into objects of
a view.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from typing import Final

from pydantic import BaseModel

from shared import wire
from shared.errors import Gone
from shared.jobs.log import Event, EventKind, JobLog
from shared.jobs.record import Job
from web.http.threadpool import run_in_threadpool

_PAGE: Final = 200
_ABSENT: Final = '"logprobs":null'


def to_json(view: BaseModel, job: Job, log: JobLog) -> str:
    """The JSON of a job's view, with the job's log-probabilities where it asked for them and its log has them."""
    text = view.model_dump_json()
    found = _read(job, log) if job.logprobs and job.status.terminal else None
    # The first place is the member: inside a JSON string each quote has a backslash before it.
    return text if found is None else text.replace(_ABSENT, f'"logprobs":[{found}]', 1)


def _read(job: Job, log: JobLog) -> str | None:
    """The members of the array; None when the log is not whole any more."""
    pieces: list[str] = []
    after = 0
    try:
        while events := log.read(job.id, after, _PAGE):
            size = sum(len(event.data) for event in events)
            pieces += run_in_threadpool(size, partial(_members, events))
            after = events[-1].n
    except Gone:
        return None
    return ",".join(pieces) if after >= job.last_event else None


def _members(events: Sequence[Event]) -> list[str]:
    found = (json.loads(event.data).get("logprobs") for event in events if event.kind is EventKind.CHUNK)
    return [wire.to_json(tokens)[1:-1] for tokens in found if tokens]
