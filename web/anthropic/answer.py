"""Turn a job's output into the content blocks of a message, as the events that stream them.

A complete message is made from the same events, so it has the same blocks as the stream.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from shared.jobs.record import Job
from shared.wire import valid_unicode
from web.anthropic.schemas import AnthropicMessage, MessageUsage, OutputDetails, StopReason
from web.anthropic.translate import ThinkingShown

Event = dict[str, Any]
_CALL_ID: Final = "call_"
_TOOL_USE_ID: Final = "toolu_"
_PARTS: Final = {
    "text_delta": ("text", "text"),
    "thinking_delta": ("thinking", "thinking"),
    "signature_delta": ("signature", "signature"),
    "input_json_delta": ("input", "partial_json"),
}
"""The field of a block that a delta extends, and the field of the delta that has the part, by the type of the delta."""


def message_id(job_id: str) -> str:
    """Return the id of the message that a job generates."""
    return f"msg_{job_id.removeprefix('job_')}"


class Answer:
    """The blocks of one message, in order. Reasoning, text and each tool call become blocks of their own."""

    def __init__(self, shown: ThinkingShown) -> None:
        self._shown = shown
        self._index = -1
        self._open = ""
        self._signed = hashlib.sha256()
        self._space = ""
        self.has_calls = False

    def add(self, delta: Mapping[str, Any]) -> Iterator[Event]:
        """Add the delta of a chunk; yield its events."""
        if (thinking := delta.get("reasoning_content")) and self._shown != "none":
            yield from self._think(thinking)
        if text := delta.get("content"):
            yield from self._write(text)
        for call in delta.get("tool_calls", ()):
            yield from self._call(call)

    def end(self) -> Iterator[Event]:
        """End the last block."""
        if not self._open:
            return
        if self._open == "thinking":
            yield self._delta({"type": "signature_delta", "signature": self._signed.hexdigest()})
        self._open = ""
        yield {"type": "content_block_stop", "index": self._index}

    def _think(self, thinking: str) -> Iterator[Event]:
        if self._open != "thinking":
            self._signed = hashlib.sha256()
            yield from self._begin({"type": "thinking", "thinking": "", "signature": ""})
        self._signed.update(thinking.encode(errors="surrogatepass"))
        if self._shown == "all":
            yield self._delta({"type": "thinking_delta", "thinking": thinking})

    def _write(self, text: str) -> Iterator[Event]:
        if self._open != "text":
            # White space alone is no block: models write it between their thoughts and a tool call.
            self._space += text
            if self._space.isspace():
                return
            text = self._space
            yield from self._begin({"type": "text", "text": ""})
        yield self._delta({"type": "text_delta", "text": text})

    def _call(self, call: Mapping[str, Any]) -> Iterator[Event]:
        self.has_calls = True
        function = call["function"]
        use_id = _TOOL_USE_ID + call["id"].removeprefix(_CALL_ID)
        yield from self._begin({"type": "tool_use", "id": use_id, "name": function["name"], "input": {}})
        yield self._delta({"type": "input_json_delta", "partial_json": function["arguments"]})

    def _begin(self, block: dict[str, Any]) -> Iterator[Event]:
        yield from self.end()
        self._open, self._space = block["type"], ""
        self._index += 1
        yield {"type": "content_block_start", "index": self._index, "content_block": block}

    def _delta(self, delta: dict[str, Any]) -> Event:
        return {"type": "content_block_delta", "index": self._index, "delta": delta}


def start_event(job: Job, prompt_tokens: int | None) -> Event:
    """Return the first event of a stream.

    Args:
        prompt_tokens: number of the prompt's tokens, if it is already known; the last event has the exact counts.
    """
    usage = MessageUsage(input_tokens=prompt_tokens or 0, output_tokens=0)
    message = AnthropicMessage(id=message_id(job.id), model=job.model_name, content=[], usage=usage)
    return {"type": "message_start", "message": message.model_dump()}


def delta_event(job: Job, max_tokens: int, *, has_calls: bool) -> Event:
    """Return the event about how a job ended."""
    reason, sequence = stop_reason(job, max_tokens, has_calls=has_calls)
    usage = usage_of(job).model_dump()
    return {"type": "message_delta", "delta": {"stop_reason": reason, "stop_sequence": sequence}, "usage": usage}


def stop_reason(job: Job, max_tokens: int, *, has_calls: bool) -> tuple[StopReason, str | None]:
    """Return why a message ended, and the stop sequence that ended it."""
    if job.stop_string is not None:
        return "stop_sequence", job.stop_string
    if job.finish_reason == "length":
        full = (job.completion_tokens or 0) < max_tokens
        return "model_context_window_exceeded" if full else "max_tokens", None
    return "tool_use" if has_calls else "end_turn", None


def usage_of(job: Job) -> MessageUsage:
    """Return the token counts of an ended job. Tokens from the prefix cache are counted apart."""
    cached = job.cached_tokens or 0
    return MessageUsage(
        input_tokens=(job.prompt_tokens or 0) - cached,
        cache_read_input_tokens=cached,
        output_tokens=job.completion_tokens or 0,
        output_tokens_details=OutputDetails(thinking_tokens=job.reasoning_tokens or 0),
    )


def message_of(job: Job, content: list[dict[str, Any]], max_tokens: int, *, has_calls: bool) -> AnthropicMessage:
    """Return the complete message of an ended job."""
    reason, sequence = stop_reason(job, max_tokens, has_calls=has_calls)
    return AnthropicMessage(
        id=message_id(job.id),
        model=job.model_name,
        content=content,
        stop_reason=reason,
        stop_sequence=sequence,
        usage=usage_of(job),
    )


def blocks_of(events: Iterable[Event]) -> list[dict[str, Any]]:
    """Return the blocks that a message's events stream."""
    blocks: list[dict[str, Any]] = []
    parts: list[dict[str, list[str]]] = []  # of each block, by its field
    for event in events:
        if event["type"] == "content_block_start":
            blocks.append(event["content_block"])
            parts.append({})
        elif event["type"] == "content_block_delta":
            name, part = _PARTS[event["delta"]["type"]]
            parts[-1].setdefault(name, []).append(event["delta"][part])
    for block, fields in zip(blocks, parts, strict=True):
        block |= {name: "".join(texts) for name, texts in fields.items()}
        if block["type"] == "tool_use":
            arguments = json.loads(block["input"])
            block["input"] = json.loads(valid_unicode(json.dumps(arguments, ensure_ascii=False)))
    return blocks
