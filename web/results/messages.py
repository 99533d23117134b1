"""The messages of jobs whose answers are split into reasoning, content and tool calls.

The worker writes what each chunk adds to the message into the job's log. A worker of an earlier version writes only
text, which then counts as content.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Final

from shared.errors import Gone
from shared.jobs.log import Event, EventKind, JobLog
from shared.jobs.record import Job
from web.http.threadpool import run_in_threadpool

_PAGE: Final = 200


def delta_of(chunk: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what a chunk adds to the message: `reasoning_content`, `content` and `tool_calls`, as far as present.

    Args:
        chunk: the data of a chunk event.
    """
    delta: Mapping[str, Any] | None = chunk.get("delta")
    return {"content": chunk["text"]} if delta is None else delta


class MessageReader:
    """Puts a message together from the chunks of its job, in order.

    Attributes:
        tool_calls: in OpenAI's form, without `index`.
        content_logprobs: entries of the content's tokens, if the job has log-probabilities.
    """

    def __init__(self) -> None:
        self.tool_calls: list[dict[str, Any]] = []
        self.content_logprobs: list[dict[str, Any]] = []
        self._texts: dict[str, list[str]] = {"content": [], "reasoning_content": []}
        self._logprobs: list[dict[str, Any]] = []

    @property
    def content(self) -> str | None:
        """The content; None if there is none next to tool calls."""
        text = "".join(self._texts["content"])
        return None if not text and self.tool_calls else text

    @property
    def reasoning(self) -> str | None:
        """The reasoning; None if there is none."""
        return "".join(self._texts["reasoning_content"]) or None

    def add(self, chunk: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Add the data of the next chunk event; return the log-probabilities of the content that it adds."""
        delta = delta_of(chunk)
        for name, texts in self._texts.items():
            if text := delta.get(name):
                texts.append(text)
        for call in delta.get("tool_calls", ()):
            self.tool_calls.append({name: value for name, value in call.items() if name != "index"})
        added = self._added_logprobs(chunk)
        self.content_logprobs += added
        return added

    def to_dict(self) -> dict[str, Any]:
        """Return the message in OpenAI's form. Fields without a value are null."""
        return {
            "role": "assistant",
            "content": self.content,
            "reasoning_content": self.reasoning,
            "tool_calls": self.tool_calls or None,
        }

    def _added_logprobs(self, chunk: Mapping[str, Any]) -> list[dict[str, Any]]:
        entries = chunk.get("logprobs") or []
        self._logprobs += entries
        if "delta" not in chunk:
            return list(entries)
        runs = chunk["delta"].get("content_tokens", [])
        return [entry for start, end in zip(runs[::2], runs[1::2], strict=True) for entry in self._logprobs[start:end]]


def read_message(job: Job, log: JobLog) -> MessageReader | None:
    """Return the message of a job that has ended; None if its log is incomplete."""
    reader, after = MessageReader(), 0
    try:
        while events := log.read(job.id, after, _PAGE):
            size = sum(len(event.data) for event in events)
            run_in_threadpool(size, partial(_add, reader, events))
            after = events[-1].n
    except Gone:
        return None
    return reader if after >= job.last_event else None


def _add(reader: MessageReader, events: Sequence[Event]) -> None:
    for chunk in _chunks(events):
        reader.add(chunk)


def _chunks(events: Iterable[Event]) -> Iterable[dict[str, Any]]:
    return (json.loads(event.data) for event in events if event.kind is EventKind.CHUNK)
