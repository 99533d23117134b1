"""Input items of the Responses API. Output items of earlier responses can be sent back as they were received."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal, TypeAlias

from pydantic import BeforeValidator, Discriminator, Field, Tag, TypeAdapter
from pydantic_core import PydanticCustomError

from web.schemas.base import RequestModel
from web.schemas.openai_fields import Advice, Unsupported

MAX_ITEMS: Final = 10_000
MAX_PARTS: Final = 1000


def type_of(value: object) -> str:
    """Return the type of an item, a part or a tool, which may not be validated yet. Messages may omit it."""
    if not isinstance(value, dict):
        return str(getattr(value, "type", ""))
    return str(value.get("type") or ("message" if "role" in value else ""))


def type_tag(value: object) -> str:
    """Return the tag of a union's member: its type in brackets, which errors omit from the path of a field."""
    return f"({type_of(value)})"


def only_types(what: str, *supported: str) -> BeforeValidator:
    """Refuse values of other types by name."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and (kind := type_of(value)) not in supported:
            message = "{what} of type {type} are not supported; supported: {supported}"
            context = {"what": what, "type": repr(kind[:64]), "supported": ", ".join(supported)}
            raise PydanticCustomError("unsupported_type", message, context)
        return value

    return BeforeValidator(check)


class InputText(RequestModel):
    """Text."""

    type: Literal["input_text"]
    text: str
    prompt_cache_breakpoint: Advice = None


class InputImage(RequestModel):
    """An image."""

    type: Literal["input_image"]
    image_url: str = Field(
        min_length=1,
        description="A data URL (`data:image/png;base64,…`), or an http(s) URL if the service allows it",
    )
    detail: Literal["auto", "low", "high", "original"] = Field("auto", description="Accepted; has no effect")
    file_id: Unsupported = None
    prompt_cache_breakpoint: Advice = None


class OutputText(RequestModel):
    """Text of an earlier answer."""

    type: Literal["output_text"]
    text: str
    annotations: Advice = None
    logprobs: Advice = None
    parsed: Advice = None


class OutputRefusal(RequestModel):
    """A refusal in an earlier answer, which the model reads as text."""

    type: Literal["refusal"]
    refusal: str

    @property
    def text(self) -> str:
        """The refusal."""
        return self.refusal


def _text_or_parts(content: object) -> str:
    return "(text)" if isinstance(content, str) else "(parts)"


ContentPart: TypeAlias = Annotated[
    Annotated[InputText, Tag("(input_text)")]
    | Annotated[InputImage, Tag("(input_image)")]
    | Annotated[OutputText, Tag("(output_text)")]
    | Annotated[OutputRefusal, Tag("(refusal)")],
    Discriminator(type_tag),
    only_types("Parts", "input_text", "input_image", "output_text", "refusal"),
]
ResultPart: TypeAlias = Annotated[
    Annotated[InputText, Tag("(input_text)")] | Annotated[InputImage, Tag("(input_image)")],
    Discriminator(type_tag),
    only_types("Parts", "input_text", "input_image"),
]
_Parts: TypeAlias = Annotated[list[ContentPart], Field(max_length=MAX_PARTS)]
_ResultParts: TypeAlias = Annotated[list[ResultPart], Field(max_length=MAX_PARTS)]
_CallId: TypeAlias = Annotated[str, Field(min_length=1, max_length=256)]


class _Item(RequestModel):
    """What all items have in common: fields that earlier answers have."""

    id: Advice = None
    status: Advice = None


class MessageItem(_Item):
    """A message."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Annotated[Annotated[str, Tag("(text)")] | Annotated[_Parts, Tag("(parts)")], Discriminator(_text_or_parts)]
    phase: Advice = None


class SummaryText(RequestModel):
    """A part of a summary."""

    type: Literal["summary_text"]
    text: str


class ReasoningText(RequestModel):
    """A part of the reasoning."""

    type: Literal["reasoning_text"]
    text: str


class ReasoningItem(_Item):
    """The reasoning of an earlier answer: `content`, otherwise `encrypted_content`, otherwise `summary`.

    Encrypted reasoning of other services cannot be read and is left out.
    """

    type: Literal["reasoning"]
    summary: list[SummaryText] = Field([], max_length=MAX_PARTS)
    content: list[ReasoningText] | None = Field(None, max_length=MAX_PARTS)
    encrypted_content: str | None = None


class _CallItem(_Item):
    """What calls and outputs of tools have in common."""

    call_id: _CallId
    caller: Advice = None
    created_by: Advice = None
    namespace: Unsupported = None


class FunctionCallItem(_CallItem):
    """A call of a function in an earlier answer."""

    type: Literal["function_call"]
    name: str = Field(min_length=1, max_length=128)
    arguments: str = Field(description="The arguments, a JSON object as text")
    async_: Advice = Field(None, alias="async")
    parsed_arguments: Advice = None


class CustomToolCallItem(_CallItem):
    """A call of a custom tool in an earlier answer."""

    type: Literal["custom_tool_call"]
    name: str = Field(min_length=1, max_length=128)
    input: str
    async_: Advice = Field(None, alias="async")


class _OutputItem(_CallItem):
    output: Annotated[
        Annotated[str, Tag("(text)")] | Annotated[_ResultParts, Tag("(parts)")], Discriminator(_text_or_parts)
    ]


class FunctionCallOutputItem(_OutputItem):
    """The result of a function."""

    type: Literal["function_call_output"]
    name: Advice = None


class CustomToolCallOutputItem(_OutputItem):
    """The result of a custom tool."""

    type: Literal["custom_tool_call_output"]


class ItemReference(RequestModel):
    """An output item of a stored response, by its id."""

    type: Literal["item_reference"]
    id: str = Field(min_length=1, max_length=256)


Item: TypeAlias = Annotated[
    Annotated[MessageItem, Tag("(message)")]
    | Annotated[ReasoningItem, Tag("(reasoning)")]
    | Annotated[FunctionCallItem, Tag("(function_call)")]
    | Annotated[FunctionCallOutputItem, Tag("(function_call_output)")]
    | Annotated[CustomToolCallItem, Tag("(custom_tool_call)")]
    | Annotated[CustomToolCallOutputItem, Tag("(custom_tool_call_output)")]
    | Annotated[ItemReference, Tag("(item_reference)")],
    Discriminator(type_tag),
    only_types(
        "Items",
        *("message", "reasoning", "function_call", "function_call_output", "custom_tool_call"),
        *("custom_tool_call_output", "item_reference"),
    ),
]
ITEMS: Final[TypeAdapter[list[Item]]] = TypeAdapter(list[Item])
"""Parses stored items."""
