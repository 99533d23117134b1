"""The log-probabilities of an ended job, collected from the chunks in its log.

They can be many megabytes of JSON. Therefore the log is read in pages, the pages are processed in threads, and the
result is inserted into the JSON of a view instead of being validated as part of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Final

from pydantic import BaseModel

from shared import wire
from shared.errors import Gone
from shared.jobs.log import Event, EventKind, JobLog
from shared.jobs.record import Job
from web.http.threadpool import run_in_threadpool

_PAGE: Final = 200
_ABSENT: Final = '"logprobs":null'


def to_json(view: BaseModel, job: Job, log: JobLog) -> str:
    """Return the JSON of a job's view, with log-probabilities if the job has ended, requested them, and has its log."""
    text = view.model_dump_json()
    elements = _read(job, log) if job.logprobs and job.status.terminal else None
    # The first occurrence is the field of the view: inside a JSON string, the quotes would be escaped.
    return text if elements is None else text.replace(_ABSENT, f'"logprobs":[{elements}]', 1)


def _read(job: Job, log: JobLog) -> str | None:
    """Return the elements of the JSON array; None if the log is incomplete."""
    elements: list[str] = []
    after = 0
    try:
        while events := log.read(job.id, after, _PAGE):
            size = sum(len(event.data) for event in events)
            elements += run_in_threadpool(size, partial(_elements, events))
            after = events[-1].n
    except Gone:
        return None
    return ",".join(elements) if after >= job.last_event else None


def _elements(events: Sequence[Event]) -> list[str]:
    lists = (json.loads(event.data).get("logprobs") for event in events if event.kind is EventKind.CHUNK)
    return [wire.to_json(tokens)[1:-1] for tokens in lists if tokens]


def openai_logprobs(entries: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return log-probabilities in the form that chat completions and responses have in common.

    Args:
        entries: log-probabilities as chunks of jobs have them (`web.schemas.jobs.TokenLogprob`).
    """
    return [{**_token(entry), "top_logprobs": [_token(each) for each in entry.get("top", ())]} for entry in entries]


def _token(entry: Mapping[str, Any]) -> dict[str, Any]:
    encoded = entry.get("bytes") or [*entry["token"].encode(errors="replace")]
    return {"token": entry["token"], "logprob": entry["logprob"], "bytes": encoded}
