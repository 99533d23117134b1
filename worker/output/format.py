"""How a model's text is divided into parts: from what mlx-lm's tokenizers declare, and the channels of gpt-oss."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any, Final, TypeAlias

from worker.output.tool_calls import HARMONY, ToolFormat


class Part(Enum):
    """A part of an answer."""

    CONTENT = auto()
    REASONING = auto()
    TOOL = auto()
    """A section with tool calls."""
    HEADER = auto()
    """What a model with channels writes before a message. Clients do not see it."""
    MESSAGE = auto()
    """A message in a channel of gpt-oss. Its header decides which part it is."""


Edges: TypeAlias = Mapping[Part, Mapping[str, Part]]
"""For each part, the markers that end it, and the part that each begins."""

_CHANNEL_TOKENS: Final = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|constrain|>")
_ENDS: Final = ("<|call|>", "<|return|>")
_CHANNEL_EDGES: Final[Edges] = {
    Part.HEADER: {"<|message|>": Part.MESSAGE, "<|start|>": Part.HEADER},
    **{
        part: dict.fromkeys(("<|end|>", "<|start|>", "<|channel|>", *_ENDS), Part.HEADER)
        for part in (Part.CONTENT, Part.REASONING, Part.TOOL)
    },
}
_PARTS: Final = {"normal": Part.CONTENT, "reasoning": Part.REASONING, "tool": Part.TOOL, "header": Part.HEADER}
"""The parts by mlx-lm's names."""


@dataclass(frozen=True, slots=True)
class MessageFormat:
    """How one model writes messages. The default is plain text.

    Attributes:
        edges: the markers, without those that begin a tool call.
        tool_starts: the parts in which a tool call may begin.
        begins: the part with which an answer begins, unless the prompt's end says otherwise.
        ends: markers after which the answer is complete.
        think_start, think_end: token ids of the markers around reasoning; empty without such markers.
        turn_tokens: ids of tokens that separate messages.
        special: the texts of the tokenizer's special tokens.
        decode: returns the text of tokens; used for the end of prompts.
    """

    edges: Edges = field(default_factory=dict)
    tool: ToolFormat | None = None
    tool_starts: tuple[Part, ...] = (Part.CONTENT,)
    begins: Part = Part.CONTENT
    ends: tuple[str, ...] = ()
    think_start: tuple[int, ...] = ()
    think_end: tuple[int, ...] = ()
    turn_tokens: frozenset[int] = frozenset()
    special: tuple[str, ...] = ()
    decode: Callable[[Sequence[int]], str] | None = None

    @property
    def marks_reasoning(self) -> bool:
        """Whether tokens mark the model's reasoning, so that its length can be limited."""
        return bool(self.think_start) or (self.tool is not None and self.tool.name == HARMONY)

    def edges_for(self, *, tools: bool) -> dict[Part, dict[str, Part]]:
        """Return the edges for a request with or without tools.

        Without tools, a marker that is an ordinary text is text; one that contains special tokens is dropped.
        """
        edges = {part: dict(targets) for part, targets in self.edges.items()}
        if self.tool is None or self.tool.name == HARMONY:
            return edges
        if tools:
            for part in self.tool_starts:
                edges.setdefault(part, {})[self.tool.start] = Part.TOOL
            edges[Part.TOOL] = {self.tool.end: Part.CONTENT} if self.tool.end else {}
            return edges
        for marker in filter(None, (self.tool.start, self.tool.end)):
            if Part.CONTENT not in self.tool_starts or any(special in marker for special in self.special):
                for part in (Part.CONTENT, *self.tool_starts):
                    edges.setdefault(part, {})[marker] = Part.CONTENT
        return edges

    def reasoning_is_open(self, prompt: Sequence[int]) -> bool:
        """Whether a prompt ends inside a reasoning section, so that the answer begins with reasoning.

        The last marker after the last token that separates messages decides. Markers in earlier messages do not count.
        """
        if not self.think_start:
            return False
        for end in range(len(prompt), 0, -1):
            if _ends_with(prompt, end, self.think_start):
                return True
            if _ends_with(prompt, end, self.think_end) or prompt[end - 1] in self.turn_tokens:
                return False
        return False

    def thoughts_start(self, prompt: Sequence[int]) -> int | None:
        """Return the index of the first marker of reasoning in the last message of a prompt.

        Templates write such markers where the answer begins.

        Returns:
            The length of the prompt if there is no marker; None if the model has no markers.
        """
        if not self.think_start:
            return None
        start = len(prompt)
        for end in range(len(prompt), 0, -1):
            if prompt[end - 1] in self.turn_tokens:
                break
            marker = next((each for each in (self.think_start, self.think_end) if _ends_with(prompt, end, each)), ())
            start = end - len(marker) if marker else start
        return start

    def end_of(self, prompt: Sequence[int]) -> str:
        """Return the text of a prompt after the last token that separates messages."""
        start = next((i for i in range(len(prompt), 0, -1) if prompt[i - 1] in self.turn_tokens), len(prompt))
        return self.decode(prompt[start:]) if self.decode is not None else ""

    def without_special_tokens(self, text: str) -> str:
        """Return a text without the texts of special tokens."""
        for special in self.special:
            text = text.replace(special, "")
        return text


PLAIN: Final = MessageFormat()
"""The format of a model that declares no markers: all text is content."""


def _ends_with(tokens: Sequence[int], end: int, marker: tuple[int, ...]) -> bool:
    start = end - len(marker)
    return tokens[end - 1] == marker[-1] and start >= 0 and tuple(tokens[start:end]) == marker


def message_format(tokenizer: Any) -> MessageFormat:
    """Return the format of a model.

    Args:
        tokenizer: mlx-lm's wrapper.
    """
    vocabulary = tokenizer.get_vocab()
    special = _special_tokens(tokenizer)
    if all(token in vocabulary for token in _CHANNEL_TOKENS):
        return channel_format(tokenizer.decode, frozenset({vocabulary["<|start|>"]}), special)
    edges, begins = _declared_edges(tokenizer)
    tool = tool_format(tokenizer)
    starts = [part for part, targets in edges.items() if Part.TOOL in targets.values()]
    think_start, think_end = tokenizer.think_start_tokens or (), tokenizer.think_end_tokens or ()
    return MessageFormat(
        edges={part: _without_tools(targets) for part, targets in edges.items()},
        tool=tool,
        tool_starts=tuple(starts) or (Part.CONTENT,),
        begins=begins,
        think_start=tuple(think_start),
        think_end=tuple(think_end),
        turn_tokens=_turn_tokens(tokenizer, {*think_start, *think_end}),
        special=special,
    )


def _declared_edges(tokenizer: Any) -> tuple[Edges, Part]:
    """Return the edges that mlx-lm declares, and the first part of an answer."""
    edges: dict[Part, dict[str, Part]] = {}
    if tokenizer.has_thinking:
        edges |= think_edges(tokenizer.think_start, tokenizer.think_end)
    for marker in tokenizer.structural_markers:
        edges.setdefault(Part.CONTENT, {})[marker] = Part.CONTENT
    for name, targets in tokenizer.response_transitions.items():
        edges.setdefault(_PARTS[name], {}).update({marker: _PARTS[target] for marker, target in targets})
    return edges, _PARTS[tokenizer.response_initial_state or "normal"]


def think_edges(start: str, end: str) -> dict[Part, dict[str, Part]]:
    """Return the edges for reasoning between two markers.

    A model may close a section that it has not opened, or open the section that its template has opened.
    """
    return {
        Part.CONTENT: {start: Part.REASONING, end: Part.CONTENT},
        Part.REASONING: {end: Part.CONTENT, start: Part.REASONING},
    }


def _without_tools(targets: Mapping[str, Part]) -> dict[str, Part]:
    return {marker: target for marker, target in targets.items() if target is not Part.TOOL}


def tool_format(tokenizer: Any) -> ToolFormat | None:
    """Return how a model calls tools; None without a chat template.

    If mlx-lm has no parser for the model's own format, the prompt explains a format that it can parse.
    """
    if tokenizer.has_tool_calling:
        return ToolFormat.of(tokenizer.tool_parser, tokenizer.tool_call_start, tokenizer.tool_call_end)
    from mlx_lm.tokenizer_utils import _infer_tool_parser  # there is no public function

    # The template of a vision model may be set after its tokenizer was loaded.
    if name := _infer_tool_parser(tokenizer):  # type: ignore[no-untyped-call]
        return tool_format_named(name)
    has_template = tokenizer.has_chat_template or tokenizer.chat_template is not None
    return ToolFormat.explained() if has_template else None


def tool_format_named(name: str) -> ToolFormat:
    """Return the format of a module of `mlx_lm.tool_parsers`."""
    module = importlib.import_module(f"mlx_lm.tool_parsers.{name}")
    return ToolFormat.of(module.parse_tool_call, module.tool_call_start, module.tool_call_end)


def channel_format(
    decode: Callable[[Sequence[int]], str] | None = None,
    turn_tokens: frozenset[int] = frozenset(),
    special: Iterable[str] = (),
) -> MessageFormat:
    """Return the format of gpt-oss: messages with headers, of which the channel `analysis` is reasoning."""
    return MessageFormat(
        edges=_CHANNEL_EDGES,
        tool=ToolFormat(HARMONY, "", "", lambda section, _tools: json.loads(section)),
        begins=Part.HEADER,
        ends=_ENDS,
        turn_tokens=turn_tokens,
        special=tuple({*special, *_CHANNEL_TOKENS, *_ENDS}),
        decode=decode,
    )


_CHANNEL: Final = re.compile(r"\b(analysis|commentary|final)\b")
_RECIPIENT: Final = re.compile(r"\bto=functions\.([^\s<]+)")


def read_header(header: str) -> tuple[Part, str]:
    """Return which part a message of gpt-oss is, and the name of the function that it calls."""
    if recipient := _RECIPIENT.search(header):
        return Part.TOOL, recipient[1]
    channel = _CHANNEL.search(header)
    return (Part.REASONING if channel and channel[1] == "analysis" else Part.CONTENT), ""


def is_header(text: str) -> bool:
    """Whether a text may be the beginning of a header, and not a message without one."""
    return "<|" in text or "to=" in text or text.strip() in ("", "assistant")


def _special_tokens(tokenizer: Any) -> tuple[str, ...]:
    return tuple(str(token.content) for token in _added_tokens(tokenizer).values() if token.special)


def _added_tokens(tokenizer: Any) -> Mapping[int, Any]:
    added: Mapping[int, Any] = getattr(tokenizer, "added_tokens_decoder", {})
    return added


def _turn_tokens(tokenizer: Any, markers: Iterable[int]) -> frozenset[int]:
    """Return the ids of special tokens and of tokens that look like them, except those of markers of reasoning."""
    added = _added_tokens(tokenizer)
    separators = {
        uid for uid, token in added.items() if token.special or str(token.content).startswith(("<|", "<\uff5c"))
    }
    return frozenset(separators - set(markers))
