"""Splits an answer's text into reasoning, content and tool calls while it is generated."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple, TypeAlias

from worker.output.format import MessageFormat, Part, is_header, read_header
from worker.output.text_field import Span, TextField
from worker.output.tool_calls import HARMONY, ToolCalls

Delta: TypeAlias = dict[str, Any]
"""New parts of a message: `reasoning_content`, `content`, `tool_calls`; only those that are not empty.

If log-probabilities are requested, `CONTENT_TOKENS` says which of the answer's tokens the content has.
"""

CONTENT_TOKENS: Final = "content_tokens"
"""Index of the first token in the answer, and that after the last, of each run of tokens."""


class _Marker(NamedTuple):
    """A marker in the buffer."""

    start: int
    text: str


class MessageParser:
    """Splits one answer. The deltas depend only on the text, not on how it is cut into calls of `push`.

    Text that may be the beginning of a marker is held back until that is known. A section with tool calls is held back
    until it is complete: its calls are emitted whole, and a malformed section becomes content. White space next to the
    border of a section is dropped.

    Args:
        begins: the part with which the answer begins.
        tools: parses calls; None if the request has no tools.

    Attributes:
        part: the part to which the next text belongs.
        done: whether the message is complete, so that no more text is needed.
        spans: where the content that the last call emitted is in the answer's text.
    """

    def __init__(self, form: MessageFormat, begins: Part = Part.CONTENT, tools: ToolCalls | None = None) -> None:
        self.part = begins
        self.done = False
        self.spans: list[Span] = []
        self._form = form
        self._edges = form.edges_for(tools=tools is not None)
        self._first = {part: frozenset(marker[0] for marker in self._edges.get(part, ())) for part in Part}
        self._tools = tools
        self._content = TextField(trims=False)
        self._reasoning = TextField(trims=True)
        self._buffer = ""
        self._position = 0  # of the buffer in the answer's text
        self._section: list[str] = []  # text of a tool section or a header
        self._header_length = 0  # of the part of a header that is in the prompt
        self._opening = ""  # the marker before it
        self._section_start = 0
        self._recipient = ""
        self._delta: Delta = {}

    def push(self, text: str) -> Delta:
        """Add text; return what is new in the message."""
        self._delta, self.spans = {}, []
        if self.done:
            return self._delta
        if not self._edges:
            self._emit_content(text, self._position)
            self._position += len(text)
            return self._delta
        if not self._buffer and self._first[self.part].isdisjoint(text):  # most tokens
            self._buffer = text
            self._take(len(text))
            return self._delta
        self._buffer += text
        self._split()
        return self._delta

    def finish(self) -> Delta:
        """Return what was held back, because no more text follows."""
        self._delta, self.spans = {}, []
        if self.done:
            return self._delta
        if self.part is Part.TOOL:
            self._finish_section()
        else:
            self._buffer = self._form.without_special_tokens(self._buffer)
            self._take(len(self._buffer))
            self._finish_header()
        self._add("content", self._content.flush())
        self.spans += self._content.spans
        return self._delta

    def prime(self, text: str) -> None:
        """Read text of the prompt that the answer continues."""
        self.push(text)
        self._content, self._reasoning = TextField(trims=False), TextField(trims=True)
        self._position = -len(self._buffer)
        self._header_length = sum(map(len, self._section))

    def _split(self) -> None:
        """Read the buffer up to text that may be the beginning of a marker."""
        while not self.done and (marker := self._next_marker()) is not None:
            self._take(marker.start)
            self._cross(marker.text)
        if not self.done:
            self._take(len(self._buffer) - self._held_length())

    def _next_marker(self) -> _Marker | None:
        """Return the marker that is complete first; of those complete at the same character, the longest."""
        found = [
            (start + len(marker), start, marker)
            for marker in self._edges.get(self.part, ())
            if (start := self._buffer.find(marker)) >= 0
        ]
        if not found:
            return None
        _, start, marker = min(found)
        return _Marker(start, marker)

    def _held_length(self) -> int:
        """Return the length of the longest end of the buffer that is the beginning of a marker."""
        return max((overlap(self._buffer, marker) for marker in self._edges.get(self.part, ())), default=0)

    def _take(self, length: int) -> None:
        """Move text from the beginning of the buffer to the present part."""
        text, self._buffer = self._buffer[:length], self._buffer[length:]
        if self.part is Part.CONTENT:
            self._emit_content(text, self._position)
        elif self.part is Part.REASONING:
            self._add("reasoning_content", self._reasoning.push(text, self._position))
        elif text:
            self._section.append(text)
        self._position += length

    def _cross(self, marker: str) -> None:
        """End the present part with a marker at the beginning of the buffer."""
        target = self._edges[self.part][marker]
        if self.part is Part.TOOL and self._is_inside_value():
            self._take(len(marker))
            return
        self._buffer = self._buffer[len(marker) :]
        self._position += len(marker)
        if self.part is Part.TOOL:
            self._close_section(marker)
        if target is Part.MESSAGE:
            target, self._recipient = self._read_header()
        self._begin(target, marker)
        self.done = self.done or marker in self._form.ends

    def _is_inside_value(self) -> bool:
        return self._tools is not None and self._tools.form.is_inside_value("".join(self._section))

    def _begin(self, part: Part, marker: str) -> None:
        """Begin a part. Sections of reasoning, and messages after a header, are separated by an empty line."""
        self._content.border()
        if part is Part.REASONING:
            self._reasoning.separate()
        elif part is Part.CONTENT and self.part is Part.HEADER:
            self._content.separate()
        self.part, self._opening = part, marker
        if part in (Part.TOOL, Part.HEADER):
            self._section, self._section_start, self._header_length = [], self._position - len(marker), 0

    def _read_header(self) -> tuple[Part, str]:
        part, recipient = read_header("".join(self._section))
        return (Part.CONTENT, "") if part is Part.TOOL and self._tools is None else (part, recipient)

    def _finish_header(self) -> None:
        """Emit text without any marker, of a model that should have written a header."""
        text = "".join(self._section)[self._header_length :]
        silent = not (self._content.started or self._reasoning.started)
        if self.part is Part.HEADER and silent and not is_header(text):
            self._emit_content(text, self._section_start)

    def _finish_section(self) -> None:
        """End a section whose end marker is missing."""
        form = self._tools.form if self._tools else None
        if form is not None and form.self_contained and self._emit_calls():
            return
        self._take(len(self._buffer))
        self._emit_malformed("")

    def _close_section(self, marker: str) -> None:
        if not self._emit_calls():
            self._emit_malformed("" if self._recipient else marker)

    def _emit_calls(self) -> bool:
        """Emit the calls of the present section; return whether there is any."""
        if self._tools is None:
            return False
        calls = self._tools.parse("".join(self._section), self._recipient)
        if calls:
            self._delta.setdefault("tool_calls", []).extend(calls)
            self._content.border()
            self.done = self._tools.full
        return bool(calls)

    def _emit_malformed(self, closing: str) -> None:
        text = self._form.without_special_tokens(self._opening + "".join(self._section) + closing)
        if self._recipient:
            self._content.separate()
        self._emit_content(text, self._section_start)

    def _emit_content(self, text: str, position: int) -> None:
        self._add("content", self._content.push(text, position) if self._edges else text)
        self.spans += self._content.spans if self._edges else [(position, position + len(text))]

    def _add(self, name: str, text: str) -> None:
        if text:
            self._delta[name] = self._delta.get(name, "") + text


def overlap(text: str, marker: str) -> int:
    """Return the length of the longest end of a text that is a proper prefix of a marker."""
    start = max(0, len(text) - len(marker) + 1)
    while (start := text.find(marker[0], start)) >= 0:
        if marker.startswith(text[start:]):
            return len(text) - start
        start += 1
    return 0


def message_parser(
    form: MessageFormat,
    prompt: Sequence[int],
    tools: Iterable[Mapping[str, Any]],
    seed: str,
    *,
    parallel_calls: bool = True,
) -> MessageParser:
    """Return the parser for an answer.

    Args:
        prompt: token ids; their end says whether the answer begins with reasoning.
        tools: the tools that the model may call.
        seed: the job's id.
    """
    declared = [*tools]
    calls = ToolCalls(form.tool, declared, seed, parallel=parallel_calls) if form.tool and declared else None
    if form.tool is not None and form.tool.name == HARMONY:
        parser = MessageParser(form, form.begins, calls)
        parser.prime(form.end_of(prompt))
        return parser
    return MessageParser(form, Part.REASONING if form.reasoning_is_open(prompt) else form.begins, calls)


def merged(deltas: Iterable[Delta]) -> Delta:
    """Return one delta for several that follow each other."""
    collected = [*deltas]
    if len(collected) == 1:
        return collected[0]
    result: Delta = {}
    for delta in collected:
        for name, value in delta.items():
            if name == CONTENT_TOKENS and name in result and result[name][-1] == value[0]:
                result[name] = [*result[name][:-1], *value[1:]]
            else:
                result[name] = result[name] + value if name in result else value
    return result
