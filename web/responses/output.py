"""Turn a job's output into the output items of a response, as the events that stream them.

The events are a function of the job's log only, so every process and every attempt numbers them alike.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from shared.jobs.record import Job
from shared.wire import valid_unicode
from web.responses.conversation import INPUT, encrypted
from web.results.logprobs import openai_logprobs
from web.results.messages import MessageReader, delta_of

StreamEvent = dict[str, Any]
JOB_PREFIX: Final = "job_"
_PREFIXES: Final = {"message": "msg", "reasoning": "rs", "function_call": "fc", "custom_tool_call": "ctc"}
_OUTPUT_TEXT: Final = "response.output_text"
_COMPLETED, _IN_PROGRESS, _INCOMPLETE = "completed", "in_progress", "incomplete"


@dataclass(frozen=True, slots=True)
class Shown:
    """What the output of a response contains.

    Attributes:
        custom_tools: names of the custom tools, whose calls the model makes as calls of functions.
        summary: whether the reasoning is shown as a summary instead of as content.
        encrypted: whether reasoning items have `encrypted_content`.
        logprobs: whether the text has log-probabilities.
    """

    custom_tools: frozenset[str] = frozenset()
    summary: bool = False
    encrypted: bool = False
    logprobs: bool = False


class Output:
    """The output items of one response, in order. Reasoning, text and each tool call become items of their own.

    Attributes:
        items: the items so far. The last one is incomplete while it is open.
    """

    def __init__(self, job: Job, shown: Shown) -> None:
        self.items: list[dict[str, Any]] = []
        self._suffix = job.id.removeprefix(JOB_PREFIX)
        self._shown = shown
        self._reader = MessageReader()
        self._open = ""
        self._texts: list[str] = []  # of the open item
        self._logprobs: list[dict[str, Any]] = []
        self._space = ""
        self._space_logprobs: list[dict[str, Any]] = []

    def add(self, chunk: Mapping[str, Any]) -> Iterator[StreamEvent]:
        """Add the data of a chunk; yield its events."""
        delta = delta_of(chunk)
        logprobs = openai_logprobs(self._reader.add(chunk)) if self._shown.logprobs else []
        if reasoning := delta.get("reasoning_content"):
            yield from self._think(reasoning)
        if (text := delta.get("content")) or logprobs:
            yield from self._write(text or "", logprobs)
        for call in delta.get("tool_calls", ()):
            yield from self._call(call)

    def end(self, status: str) -> Iterator[StreamEvent]:
        """End the last item with a status. A completed answer without text and calls gets an empty message."""
        silent = all(item["type"] == "reasoning" for item in self.items)
        if status == _COMPLETED and silent:
            yield from self._begin_message()
        yield from self._close(status)

    def _think(self, text: str) -> Iterator[StreamEvent]:
        if self._open != "reasoning":
            yield from self._begin("reasoning", {"summary": []})
            yield self._part("added", "")
        self._texts.append(text)
        yield self._event(f"response.{self._reasoning_name}.delta", **self._place, delta=text)

    def _write(self, text: str, logprobs: list[dict[str, Any]]) -> Iterator[StreamEvent]:
        if self._open != "message":
            # White space alone is no item: models write it between their reasoning and a tool call.
            self._space += text
            self._space_logprobs += logprobs
            if not self._space.strip():
                return
            text, logprobs = self._space, self._space_logprobs
            yield from self._begin_message()
        self._texts.append(text)
        self._logprobs += logprobs
        yield self._event(f"{_OUTPUT_TEXT}.delta", **self._place, delta=text, logprobs=logprobs)

    def _begin_message(self) -> Iterator[StreamEvent]:
        yield from self._begin("message", {"role": "assistant", "content": []})
        yield self._part("added", "")

    def _call(self, call: Mapping[str, Any]) -> Iterator[StreamEvent]:
        """Add a call, which the job's log has as a whole."""
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        custom = name in self._shown.custom_tools
        kind, field = ("custom_tool_call", "input") if custom else ("function_call", "arguments")
        value = _custom_input(arguments) if custom else arguments
        yield from self._begin(kind, {"call_id": call["id"], "name": name, field: ""})
        prefix = "response.custom_tool_call_input" if custom else "response.function_call_arguments"
        yield self._event(f"{prefix}.delta", **self._item_place, delta=value)
        yield self._event(f"{prefix}.done", **self._item_place, **{field: value})
        self.items[-1][field] = value
        yield from self._close(_COMPLETED)

    def _begin(self, kind: str, fields: Mapping[str, Any]) -> Iterator[StreamEvent]:
        yield from self._close(_COMPLETED)
        item_id = f"{_PREFIXES[kind]}_{self._suffix}_{len(self.items)}"
        self.items.append({"id": item_id, "type": kind, "status": _IN_PROGRESS, **fields})
        self._open, self._texts, self._logprobs = kind, [], []
        self._space, self._space_logprobs = "", []
        yield self._event("response.output_item.added", output_index=self._index, item={**self.items[-1]})

    def _close(self, status: str) -> Iterator[StreamEvent]:
        """End the open item."""
        if not self._open:
            return
        item, text = self.items[-1], "".join(self._texts)
        if self._open == "message":
            yield self._event(f"{_OUTPUT_TEXT}.done", **self._place, text=text, logprobs=self._logprobs)
            yield self._part("done", text)
            item["content"] = [self._text_part(text)]
        elif self._open == "reasoning":
            yield self._event(f"response.{self._reasoning_name}.done", **self._place, text=text)
            yield self._part("done", text)
            item["summary" if self._shown.summary else "content"] = [self._text_part(text)]
            if self._shown.encrypted:
                item["encrypted_content"] = encrypted(text)
        item["status"] = status
        self._open = ""
        yield self._event("response.output_item.done", output_index=self._index, item={**item})

    def _part(self, state: str, text: str) -> StreamEvent:
        """Return the event that a part of the open item begins or ends."""
        summary = self._open == "reasoning" and self._shown.summary
        kind = "reasoning_summary_part" if summary else "content_part"
        return self._event(f"response.{kind}.{state}", **self._place, part=self._text_part(text))

    def _text_part(self, text: str) -> dict[str, Any]:
        if self._open == "message":
            return {"type": "output_text", "text": text, "annotations": [], "logprobs": [*self._logprobs]}
        return {"type": "summary_text" if self._shown.summary else "reasoning_text", "text": text}

    @property
    def _reasoning_name(self) -> str:
        return "reasoning_summary_text" if self._shown.summary else "reasoning_text"

    @property
    def _index(self) -> int:
        return len(self.items) - 1

    @property
    def _item_place(self) -> dict[str, Any]:
        return {"item_id": self.items[-1]["id"], "output_index": self._index}

    @property
    def _place(self) -> dict[str, Any]:
        """Where the open part is."""
        index = "summary_index" if self._open == "reasoning" and self._shown.summary else "content_index"
        return {**self._item_place, index: 0}

    @staticmethod
    def _event(kind: str, **fields: Any) -> StreamEvent:
        return {"type": kind, **fields}


def _custom_input(arguments: str) -> str:
    """Return the input of a custom tool from the arguments of the function that stands for it."""
    value = json.loads(arguments).get(INPUT)
    return valid_unicode(value) if isinstance(value, str) else arguments
