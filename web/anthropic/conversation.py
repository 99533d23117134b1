"""Translate a conversation of the Messages API to the messages of a job.

Each translated part keeps the path of the block that it comes from, because errors must name the block.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

from shared.errors import Invalid
from shared.wire import to_json
from web.anthropic.blocks import (
    DocumentBlock,
    ImageBlock,
    TextBlock,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
)
from web.anthropic.schemas import CountRequest, Message

_ERROR_PREFIX: Final = "Error: "
"""What the model reads before the text of a failed tool."""


class Conversation:
    """The messages of a job.

    Attributes:
        messages: messages in the format of `JobRequest.messages`.
        paths: the path in the request, by the path in the job's request.
    """

    def __init__(self, request: CountRequest) -> None:
        self.messages: list[dict[str, Any]] = []
        self.paths: dict[str, str] = {}
        self._calls: set[str] = set()
        if request.system:
            text = request.system if isinstance(request.system, str) else _joined(request.system)
            self._add({"role": "system", "content": text}, "system")
        for index, (role, group) in enumerate_groups(request.messages):
            self._translate(role, group, index)
        self.continues = request.messages[-1].role == "assistant"
        """Whether the answer continues the last message."""
        if self.continues and "tool_calls" in self.messages[-1]:
            detail = "The last message has tool_use blocks: a user message with their results must follow."
            raise Invalid(detail, field=f"messages[{len(request.messages) - 1}].content")

    def _translate(self, role: str, blocks: Sequence[tuple[str, Any]], index: int) -> None:
        if role == "system":
            self._add({"role": "system", "content": _joined(block for _, block in blocks)}, f"messages[{index}]")
        elif role == "assistant":
            self._add_assistant(blocks, f"messages[{index}]")
        else:
            self._add_user(blocks, f"messages[{index}]")

    def _add(self, message: dict[str, Any], path: str) -> None:
        self.paths[f"messages[{len(self.messages)}]"] = path
        self.messages.append(message)

    def _add_assistant(self, blocks: Sequence[tuple[str, Any]], path: str) -> None:
        text = "".join(block.text for _, block in blocks if isinstance(block, TextBlock))
        thinking = "".join(block.thinking for _, block in blocks if isinstance(block, ThinkingBlock))
        calls = [_tool_call(block) for _, block in blocks if isinstance(block, ToolUseBlock)]
        self._calls |= {call["id"] for call in calls}
        message: dict[str, Any] = {"role": "assistant", "content": text or (None if calls else "")}
        if thinking:
            message["reasoning_content"] = thinking
        if calls:
            message["tool_calls"] = calls
        self._add(message, path)

    def _add_user(self, blocks: Sequence[tuple[str, Any]], path: str) -> None:
        """Add results as messages of tools, and then everything else as one message of the user."""
        parts: list[tuple[str, dict[str, Any]]] = []
        for block_path, block in blocks:
            if isinstance(block, ToolResultBlock):
                parts += self._add_result(block, block_path)
            else:
                parts.append((block_path, _part(block)))
        if parts or not any(isinstance(block, ToolResultBlock) for _, block in blocks):
            number = len(self.messages)
            self.paths |= {f"messages[{number}].content[{i}]": part_path for i, (part_path, _) in enumerate(parts)}
            self._add({"role": "user", "content": [part for _, part in parts] or ""}, path)

    def _add_result(self, block: ToolResultBlock, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """Add a tool's result; return its images, which become part of the user's message.

        Chat templates expect the results of tools to be text.
        """
        if block.tool_use_id not in self._calls:
            detail = f"No earlier message has a tool_use block with the id {block.tool_use_id!r}."
            raise Invalid(detail, field=f"{path}.tool_use_id")
        content = [TextBlock(type="text", text=block.content)] if isinstance(block.content, str) else block.content
        texts = [each for each in content if not isinstance(each, ImageBlock)]
        text = (_ERROR_PREFIX if block.is_error else "") + _joined(texts)
        self._add({"role": "tool", "tool_call_id": block.tool_use_id, "content": text}, path)
        images = ((f"{path}.content[{i}]", each) for i, each in enumerate(content) if isinstance(each, ImageBlock))
        return ((image_path, _part(image)) for image_path, image in images)


def enumerate_groups(messages: Sequence[Message]) -> Iterator[tuple[int, tuple[str, list[tuple[str, Any]]]]]:
    """Join successive messages of one role, as the API does: chat templates expect alternating roles.

    Yields:
        The number of a group's first message, its role, and its blocks with their paths.
    """
    start = 0
    while start < len(messages):
        end = start + 1
        while end < len(messages) and messages[end].role == messages[start].role:
            end += 1
        blocks = [
            (f"messages[{number}].content[{i}]", block)
            for number in range(start, end)
            for i, block in enumerate(messages[number].blocks)
        ]
        yield start, (messages[start].role, blocks)
        start = end


def _joined(blocks: Iterable[TextBlock | DocumentBlock]) -> str:
    return "\n".join(block.text for block in blocks)


def _part(block: TextBlock | ImageBlock | DocumentBlock) -> dict[str, Any]:
    if isinstance(block, ImageBlock):
        return {"type": "image_url", "image_url": {"url": block.source.url}}
    return {"type": "text", "text": block.text}


def _tool_call(block: ToolUseBlock) -> dict[str, Any]:
    return {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": to_json(block.input)}}
