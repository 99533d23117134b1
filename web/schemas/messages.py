"""Messages of a conversation: the input of a model's chat template."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BeforeValidator, Discriminator, Field, StringConstraints, Tag, model_validator
from pydantic_core import PydanticCustomError

from web.schemas.base import RequestModel
from web.schemas.tools import ToolCall

MAX_TOOL_CALLS: Final = 128
ParticipantName = Annotated[str, StringConstraints(pattern=r"^[^\s<|\\/>]{1,128}$")]
"""Excludes characters with which a name could end its place in a template."""
_ROLE_OF_FIELD: Final = {"reasoning_content": "assistant", "tool_calls": "assistant", "tool_call_id": "tool"}
_IMAGE_DESCRIPTION = "A data URL (`data:image/png;base64,…`), or an http(s) URL if the service allows it"


class ImageUrl(RequestModel):
    """The URL of an image, in OpenAI's format."""

    url: str = Field(min_length=1, description=_IMAGE_DESCRIPTION)
    detail: Literal["auto", "low", "high"] = Field("auto", description="Accepted for compatibility; has no effect")


class Part(RequestModel):
    """A part of a message: text, or an image as `image_url` (OpenAI's format) or `image`."""

    type: Literal["text", "image_url", "image"]
    text: str | None = Field(None, description="Required for type `text`")
    image_url: Annotated[
        ImageUrl | None, BeforeValidator(lambda url: {"url": url} if isinstance(url, str) else url)
    ] = Field(None, description="Required for type `image_url`")
    image: str | None = Field(None, min_length=1, description=f"Required for type `image`. {_IMAGE_DESCRIPTION}")

    @model_validator(mode="after")
    def _has_only_the_field_of_its_type(self) -> Self:
        fields = {name for name in ("text", "image_url", "image") if getattr(self, name) is not None}
        if fields != {self.type}:
            message = "A part of type {type} must have the field {type}, and no other besides type"
            raise PydanticCustomError("part", message, {"type": self.type})
        return self

    @property
    def source(self) -> str:
        """The URL of an image part."""
        return self.image_url.url if self.image_url else self.image or ""

    def to_record(self) -> dict[str, Any]:
        """Return a text part as the job's record stores it; image parts have been replaced by `StoredImage`."""
        return {"type": "text", "text": self.text or ""}


class StoredImage(RequestModel):
    """A reference to an image in a job's messages: the digest of its file and its size in pixels."""

    image: str
    width: int
    height: int

    def to_record(self) -> dict[str, Any]:
        """Return the reference as the job's record stores it."""
        return {"type": "image", **self.model_dump()}


def _content_tag(content: object) -> str:
    return "(text)" if isinstance(content, str) else "(parts)"


# The tags are in brackets so that `web.http.problems` can omit them from the path of an invalid field.
Content = Annotated[
    Annotated[str, Tag("(text)")] | Annotated[list[Part], Field(min_length=1, max_length=1000), Tag("(parts)")],
    Discriminator(_content_tag),
]


class Message(RequestModel):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"] = Field(
        description="`developer` is the same as `system` for models whose template does not know it"
    )
    content: Content | None = Field(
        None,
        description="Text, or a list of text and image parts. Required, except for assistant messages with "
        "`tool_calls` or `reasoning_content`",
    )
    name: ParticipantName | None = Field(
        None, description="Name of the author or, for role `tool`, of the function. Most templates do not use it"
    )
    reasoning_content: str | None = Field(
        None,
        description="For role `assistant`: the reasoning before the answer. Each template decides whether to use it",
    )
    tool_calls: list[ToolCall] | None = Field(
        None, min_length=1, max_length=MAX_TOOL_CALLS, description="For role `assistant`: the tool calls of the answer"
    )
    tool_call_id: str | None = Field(
        None,
        min_length=1,
        max_length=256,
        description="Required for role `tool`: `id` of the tool call whose result `content` is",
    )

    @model_validator(mode="after")
    def _has_the_fields_of_its_role(self) -> Self:
        for name, role in _ROLE_OF_FIELD.items():
            if getattr(self, name) is not None and self.role != role:
                message = "{field} is allowed only in messages with role {role}"
                raise PydanticCustomError("field_of_another_role", message, {"field": name, "role": role})
        if self.role == "tool" and self.tool_call_id is None:
            raise PydanticCustomError("no_tool_call_id", "A message with role tool must have tool_call_id")
        if self.content is None and not self.tool_calls and self.reasoning_content is None:
            raise PydanticCustomError("no_content", "The message must have content")
        return self

    @property
    def is_empty(self) -> bool:
        """Whether the message has neither text, images nor tool calls."""
        if self.tool_calls:
            return False
        if isinstance(self.content, list):
            return not any(part.type != "text" or part.text for part in self.content)
        return not self.content

    @property
    def can_be_continued(self) -> bool:
        """Whether the model can continue the message: it is an assistant's text."""
        content = self.content
        text = content[-1].text if isinstance(content, list) else content
        return self.role == "assistant" and not self.tool_calls and bool(text)

    def to_record(self) -> dict[str, Any]:
        """Return the message as the job's record stores it.

        Parts that are all text are joined into one string, because the templates of most models support only strings.
        """
        record: dict[str, Any] = {"role": self.role, "content": self._content_record()}
        for name in ("name", "reasoning_content", "tool_call_id"):
            if (value := getattr(self, name)) is not None:
                record[name] = value
        if self.tool_calls:
            record["tool_calls"] = [call.model_dump() for call in self.tool_calls]
        return record

    def _content_record(self) -> str | list[dict[str, Any]] | None:
        if not isinstance(self.content, list):
            return self.content
        parts = [part.to_record() for part in self.content]
        text_only = all(part["type"] == "text" for part in parts)
        return "\n".join(part["text"] for part in parts) if text_only else parts


def check_results(messages: Iterable[Message]) -> None:
    """Raise an error if a tool message does not belong to an earlier tool call."""
    calls = set[str]()
    for index, message in enumerate(messages):
        calls.update(call.id for call in message.tool_calls or ())
        if message.role == "tool" and message.tool_call_id not in calls:
            text = "messages[{index}]: no earlier assistant message has a tool call with the id {id}"
            raise PydanticCustomError("unknown_tool_call", text, {"index": index, "id": message.tool_call_id})
