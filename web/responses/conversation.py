"""Translate the items of a response's input to the messages of a job.

Each translated part keeps the path of the item that it comes from, because errors must name the item.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterable, Sequence
from typing import Any, Final

from shared.errors import Invalid
from web.responses.items import (
    CustomToolCallItem,
    CustomToolCallOutputItem,
    FunctionCallItem,
    FunctionCallOutputItem,
    InputImage,
    Item,
    ItemReference,
    MessageItem,
    ReasoningItem,
)

INPUT: Final = "input"
"""The parameter of the function that stands for a custom tool: its text."""
_SYSTEM: Final = ("system", "developer")
_ENCRYPTED: Final = "mlxq."


def encrypted(reasoning: str) -> str:
    """Return reasoning in the form in which clients keep it for requests that continue a conversation.

    It is encoded and not secret: the client may read the reasoning anyway.
    """
    return _ENCRYPTED + base64.urlsafe_b64encode(reasoning.encode(errors="surrogatepass")).decode()


def _decrypted(text: str) -> str:
    """Return the reasoning in the output of `encrypted`; empty for that of another service."""
    if not text.startswith(_ENCRYPTED):
        return ""
    try:
        return base64.urlsafe_b64decode(text.removeprefix(_ENCRYPTED)).decode(errors="surrogatepass")
    except (binascii.Error, UnicodeDecodeError):
        return ""


class Conversation:
    """The messages of a job.

    Consecutive items with the same role become one message, because chat templates expect alternating roles.

    Args:
        items: all items, each with its path in the request.

    Attributes:
        messages: messages in the format of `JobRequest.messages`.
        paths: the path in the request, by the path in the job's request.

    Raises:
        Invalid: an output belongs to no call, or the last item is one of the model's.
    """

    def __init__(self, instructions: str | None, items: Sequence[tuple[str, Item]]) -> None:
        self.messages: list[dict[str, Any]] = []
        self.paths: dict[str, str] = {}
        self._calls = set[tuple[str, str]]()
        self._images: list[tuple[str, dict[str, Any]]] = []
        self._texts: dict[tuple[int, str], list[str]] = {}
        if instructions:
            self._add({"role": "system", "content": ""}, "instructions")
            self._extend("content", instructions)
        for path, item in items:
            self._translate(item, path)
        self._add_images()
        self._join_texts()
        if self.messages and self.messages[-1]["role"] == "assistant":
            detail = "The last item must be a message that the model answers, or the output of a tool."
            raise Invalid(detail, field="input")

    def _translate(self, item: Item, path: str) -> None:
        if isinstance(item, FunctionCallOutputItem | CustomToolCallOutputItem):
            self._add_output(item, path)
            return
        self._add_images()
        match item:
            case MessageItem():
                self._add_message(item, path)
            case ReasoningItem():
                self._extend_assistant("reasoning_content", _reasoning(item), path)
            case FunctionCallItem():
                self._add_call(item.type, item.call_id, item.name, item.arguments, path)
            case CustomToolCallItem():
                self._add_call(item.type, item.call_id, item.name, json.dumps({INPUT: item.input}), path)
            case ItemReference():  # `Responses.resolved` has replaced those of stored responses
                raise Invalid("Items cannot be referenced here.", field=path)

    def _add_message(self, item: MessageItem, path: str) -> None:
        if item.role == "assistant":
            self._extend_assistant("content", _text(item), path)
        elif item.role in _SYSTEM:
            self._add_system(item, path)
        else:
            self._add_user(_parts(item, path), path)

    def _add(self, message: dict[str, Any], path: str) -> None:
        self.paths[f"messages[{len(self.messages)}]"] = path
        self.messages.append(message)

    def _add_system(self, item: MessageItem, path: str) -> None:
        """Add a system message. Those at the beginning become one: many templates read only the first message."""
        text = _text(item)
        if not (self.messages and all(message["role"] in _SYSTEM for message in self.messages)):
            self._add({"role": "system" if not self.messages else item.role, "content": ""}, path)
        self._extend("content", text)

    def _add_user(self, parts: Sequence[tuple[str, dict[str, Any]]], path: str) -> None:
        if not (self.messages and self.messages[-1]["role"] == "user"):
            self._add({"role": "user", "content": []}, path)
        content, number = self.messages[-1]["content"], len(self.messages) - 1
        for part_path, part in parts:
            self.paths[f"messages[{number}].content[{len(content)}]"] = part_path
            content.append(part)

    def _extend_assistant(self, field: str, text: str, path: str) -> None:
        if text or field == "content":  # reasoning may be unreadable
            self._assistant(path)
            self._extend(field, text)

    def _extend(self, field: str, text: str) -> None:
        """Add text to a field of the last message."""
        self._texts.setdefault((len(self.messages) - 1, field), []).append(text)

    def _join_texts(self) -> None:
        """Set the fields of all texts at once: joining them one by one took a minute for 10,000 items of 1.5 KB."""
        for (number, field), texts in self._texts.items():
            self.messages[number][field] = "\n\n".join(filter(None, texts))

    def _add_call(self, kind: str, call_id: str, name: str, arguments: str, path: str) -> None:
        self._calls.add((kind, call_id))
        calls = self._assistant(path).setdefault("tool_calls", [])
        self.paths[f"messages[{len(self.messages) - 1}].tool_calls[{len(calls)}]"] = path
        function = {"name": name, "arguments": arguments}
        calls.append({"id": call_id, "type": "function", "function": function})

    def _assistant(self, path: str) -> dict[str, Any]:
        """Return the message of the assistant to which the next item belongs."""
        if not (self.messages and self.messages[-1]["role"] == "assistant"):
            self._add({"role": "assistant", "content": None}, path)
        return self.messages[-1]

    def _add_output(self, item: FunctionCallOutputItem | CustomToolCallOutputItem, path: str) -> None:
        """Add a tool's output; keep its images, because chat templates expect the results of tools to be text."""
        kind = item.type.removesuffix("_output")
        if (kind, item.call_id) not in self._calls:
            detail = f"No earlier item of type {kind} has the call_id {item.call_id!r}."
            raise Invalid(detail, field=f"{path}.call_id")
        parts = [] if isinstance(item.output, str) else item.output
        texts = [item.output] if isinstance(item.output, str) else [p.text for p in parts if p.type == "input_text"]
        self._add({"role": "tool", "tool_call_id": item.call_id, "content": "\n".join(texts)}, path)
        self._images += [
            (f"{path}.output[{i}]", _image(part)) for i, part in enumerate(parts) if isinstance(part, InputImage)
        ]

    def _add_images(self) -> None:
        """Add the images of the last outputs as a message of the user."""
        if self._images:
            self._add_user(self._images, self._images[0][0])
            self._images = []


def _parts(item: MessageItem, path: str) -> list[tuple[str, dict[str, Any]]]:
    if isinstance(item.content, str):
        return [(path, {"type": "text", "text": item.content})]
    return [
        (f"{path}.content[{i}]", _image(part) if isinstance(part, InputImage) else {"type": "text", "text": part.text})
        for i, part in enumerate(item.content)
    ]


def _image(part: InputImage) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": part.image_url}}


def _text(item: MessageItem) -> str:
    """Return the text of a message of the assistant or of the system."""
    if isinstance(item.content, str):
        return item.content
    for part in item.content:
        if isinstance(part, InputImage):
            raise Invalid(f"Messages with the role {item.role} cannot have images.", field="input")
    return "".join(part.text for part in item.content if not isinstance(part, InputImage))


def _reasoning(item: ReasoningItem) -> str:
    if item.content:
        return _joined(item.content)
    return (item.encrypted_content and _decrypted(item.encrypted_content)) or _joined(item.summary)


def _joined(parts: Iterable[Any]) -> str:
    return "\n\n".join(part.text for part in parts)
