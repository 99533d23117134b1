"""Answers in the formats of chat completions and text completions, whole and as streams of chunks."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from shared import VERSION
from shared.errors import Gone
from shared.jobs.log import Event, EventKind, JobLog
from shared.jobs.record import Job
from shared.jobs.store import Jobs
from shared.wire import to_json
from web.openai.requests import ChatRequest, CompletionRequest, GenerationRequest
from web.openai.usage import finish_reason, usage
from web.results.logprobs import openai_logprobs
from web.results.messages import MessageReader, delta_of, read_message
from web.schemas.openai_fields import tier_of_priority

FINGERPRINT: Final = f"mlxq-{VERSION}"
DONE: Final = b"data: [DONE]\n\n"
_STRING: Final = r'"(?:[^"\\]|\\.)*"'
_ONLY_CONTENT: Final = re.compile(rf'\{{"text":{_STRING},"delta":(\{{"content":{_STRING}\}})\}}')
_NO_MORE: Final = '"logprobs":null,"finish_reason":null'
_ALWAYS: Final = frozenset({"role", "content"})
_DELTA: Final = frozenset({"content", "reasoning_content", "tool_calls"})


class Answer(Protocol):
    """The answer to a request."""

    def whole(self, jobs: Sequence[Job]) -> str:
        """Return the complete answer as JSON."""
        ...

    def chunks(self, index: int, events: Sequence[Event]) -> str:
        """Return the stream's chunks for events of the job with this index."""
        ...

    def end(self, index: int, job: Job) -> str:
        """Return the last chunk of a job that succeeded."""
        ...

    def usage(self, jobs: Sequence[Job]) -> str:
        """Return the chunk with the token counts; empty unless the request asked for it."""
        ...


class _Base:
    """What both kinds of answers have in common.

    Args:
        job: the first job of the request.
    """

    prefix: str
    object: str
    chunk_object: str

    def __init__(self, body: GenerationRequest, job: Job, jobs: Jobs, log: JobLog) -> None:
        self._body = body
        self._jobs = jobs
        self._log = log
        self._fields: dict[str, Any] = {
            "id": f"{self.prefix}-{job.id}",
            "created": int(job.created_at),
            "model": job.model_name,
            "system_fingerprint": FINGERPRINT,
        }
        if "service_tier" in body.model_fields_set:
            self._fields["service_tier"] = tier_of_priority(job.priority)
        self._include_usage = bool(body.stream_options and body.stream_options.include_usage)
        self._head = f"data: {to_json({**self._fields, 'object': self.chunk_object})[:-1]},"
        self._tail = ',"usage":null}\n\n' if self._include_usage else "}\n\n"

    def whole(self, jobs: Sequence[Job]) -> str:
        """See `Answer.whole`."""
        choices = [self._choice(index, job) for index, job in enumerate(jobs)]
        fields = {**self._fields, "object": self.object, "choices": choices, "usage": usage(jobs, self._body.n)}
        return to_json(fields)

    def usage(self, jobs: Sequence[Job]) -> str:
        """See `Answer.usage`."""
        if not self._include_usage:
            return ""
        return f'{self._head}"choices":[],"usage":{to_json(usage(jobs, self._body.n))}}}\n\n'

    def _choice(self, index: int, job: Job) -> dict[str, Any]:
        raise NotImplementedError

    def _read(self, job: Job) -> MessageReader:
        """Read the log of a job that has ended.

        Raises:
            Gone: the log is incomplete.
        """
        reader = read_message(job, self._log)
        if reader is None:
            raise Gone("The job has ended, but its log is no longer stored. GET the job to read its text.")
        return reader

    def _chunk(self, index: int, content: str, logprobs: Any = None, reason: str | None = None) -> str:
        """Return a chunk with one choice.

        Args:
            content: what the chunk adds, as a member of the choice.
        """
        choice = f'"index":{index},{content},"logprobs":{to_json(logprobs)},"finish_reason":{to_json(reason)}'
        return f'{self._head}"choices":[{{{choice}}}]{self._tail}'


@dataclass(slots=True)
class _State:
    """What the stream of a choice has sent so far: content, tool calls."""

    speaks: bool = False
    calls: bool = False
    reader: MessageReader = field(default_factory=MessageReader)


class ChatAnswer(_Base):
    """A chat completion."""

    prefix = "chatcmpl"
    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, body: ChatRequest, job: Job, jobs: Jobs, log: JobLog) -> None:
        super().__init__(body, job, jobs, log)
        self._with_logprobs = body.logprobs
        self._states = [_State() for _ in range(body.n)]
        self._content = None if body.tools else ""
        """The content that the stream begins with: it stays null if there are only tool calls."""
        self._begun = False

    def _choice(self, index: int, job: Job) -> dict[str, Any]:
        reader = self._read(job)
        message = {name: value for name, value in reader.to_dict().items() if name in _ALWAYS or value is not None}
        return {
            "index": index,
            "message": {**message, "refusal": None},
            "logprobs": _logprobs(reader.content_logprobs) if self._with_logprobs else None,
            "finish_reason": finish_reason(job, calls_tools=bool(reader.tool_calls)),
        }

    def chunks(self, index: int, events: Sequence[Event]) -> str:
        """See `Answer.chunks`. The first chunk of each choice has its role."""
        chunks: list[str] = []
        for event in events:
            if event.kind is EventKind.CHUNK:
                chunks += self._content_delta(index, event.data) or self._delta(index, json.loads(event.data))
        return "".join(chunks)

    def end(self, index: int, job: Job) -> str:
        """See `Answer.end`."""
        state = self._states[index]
        text = "" if self._begun else self._begin()
        if self._content is None and not (state.speaks or state.calls):
            text += self._chunk(index, '"delta":{"content":""}')  # as in a complete answer
        return text + self._chunk(index, '"delta":{}', reason=finish_reason(job, calls_tools=state.calls))

    def _begin(self) -> str:
        """Return the first chunks of all choices. OpenAI's client expects the choices in order."""
        self._begun = True
        delta = f'"delta":{{"role":"assistant","content":{to_json(self._content)},"refusal":null}}'
        return "".join(self._chunk(index, delta) for index in range(len(self._states)))

    def _content_delta(self, index: int, data: str) -> list[str]:
        """Return the chunk for a job's chunk that has nothing but content, without parsing it; otherwise nothing."""
        match = None if self._with_logprobs else _ONLY_CONTENT.fullmatch(data)
        if match is None:
            return []
        self._states[index].speaks = True
        text = f'{self._head}"choices":[{{"index":{index},"delta":{match[1]},{_NO_MORE}}}]{self._tail}'
        return [text] if self._begun else [self._begin(), text]

    def _delta(self, index: int, chunk: Mapping[str, Any]) -> list[str]:
        state = self._states[index]
        delta = {name: value for name, value in delta_of(chunk).items() if name in _DELTA and value}
        logprobs = None
        if self._with_logprobs:  # the reader is needed to find the tokens of the content
            entries = state.reader.add(chunk)
            logprobs = _logprobs(entries) if entries else None
        if not (delta or logprobs):
            return []
        state.speaks = state.speaks or "content" in delta
        if "tool_calls" in delta:
            state.calls = True
            delta["tool_calls"] = [{"type": "function", **call} for call in delta["tool_calls"]]
        text = self._chunk(index, f'"delta":{to_json(delta)}', logprobs)
        return [text] if self._begun else [self._begin(), text]


def _logprobs(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {"content": openai_logprobs(entries), "refusal": None}


class CompletionAnswer(_Base):
    """A text completion."""

    prefix = "cmpl"
    object = chunk_object = "text_completion"

    def __init__(self, body: CompletionRequest, job: Job, jobs: Jobs, log: JobLog) -> None:
        super().__init__(body, job, jobs, log)
        self._with_logprobs = body.logprobs is not None
        self._offsets: dict[int, int] = {}

    def _choice(self, index: int, job: Job) -> dict[str, Any]:
        # Without deltas, all tokens are content.
        entries = self._read(job).content_logprobs if self._with_logprobs else None
        return {
            "index": index,
            "text": self._jobs.text(job),
            "logprobs": None if entries is None else _completion_logprobs(entries),
            "finish_reason": finish_reason(job),
        }

    def chunks(self, index: int, events: Sequence[Event]) -> str:
        """See `Answer.chunks`."""
        return "".join(self._text(index, json.loads(event.data)) for event in events if event.kind is EventKind.CHUNK)

    def end(self, index: int, job: Job) -> str:
        """See `Answer.end`."""
        return self._chunk(index, '"text":""', reason=finish_reason(job))

    def _text(self, index: int, chunk: Mapping[str, Any]) -> str:
        logprobs = None
        if entries := chunk.get("logprobs") if self._with_logprobs else None:
            offset = self._offsets.get(index, 0)
            logprobs = _completion_logprobs(entries, offset)
            self._offsets[index] = offset + sum(len(entry["token"]) for entry in entries)
        return self._chunk(index, f'"text":{to_json(chunk["text"])}', logprobs)


def _completion_logprobs(entries: Sequence[Mapping[str, Any]], offset: int = 0) -> dict[str, Any]:
    """Return the log-probabilities of a text completion's tokens.

    Args:
        offset: where the text of the first token begins in the completion.
    """
    offsets: list[int] = []
    for entry in entries:
        offsets.append(offset)
        offset += len(entry["token"])
    return {
        "tokens": [entry["token"] for entry in entries],
        "token_logprobs": [entry["logprob"] for entry in entries],
        "top_logprobs": [{each["token"]: each["logprob"] for each in entry.get("top", ())} for entry in entries],
        "text_offset": offsets,
    }
