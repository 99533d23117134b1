"""Generation requests."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Annotated, Any, Final, Literal, Self

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from web.schemas.base import RequestModel

MAX_STOPS = 16
MAX_STOP_BYTES = 4096
MAX_METADATA = 16
MAX_MESSAGES = 10_000
MAX_LOGPROBS = 20

StopString = Annotated[str, StringConstraints(min_length=1, max_length=1000)]
_STOP_SCHEMA: Final = {"type": "string", "minLength": 1, "maxLength": 1000}
Stop = Annotated[
    list[StopString],
    Field(max_length=MAX_STOPS),
    # A single string means a list of one. With a union instead, errors would not name the invalid element.
    BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
    WithJsonSchema(
        {
            "anyOf": [
                _STOP_SCHEMA,
                {"type": "array", "items": _STOP_SCHEMA, "maxItems": MAX_STOPS},
            ]
        }
    ),
]
Metadata = Annotated[
    dict[
        Annotated[str, StringConstraints(min_length=1, max_length=64)],
        Annotated[str, StringConstraints(max_length=512)],
    ],
    Field(max_length=MAX_METADATA),
]
PriorityName = Literal["high", "normal", "batch"]
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

    role: Literal["system", "user", "assistant"]
    content: Content = Field(description="Text, or a list of text and image parts")

    @property
    def is_empty(self) -> bool:
        """Whether the message has neither text nor images."""
        if isinstance(self.content, str):
            return not self.content
        return not any(part.type != "text" or part.text for part in self.content)

    def to_record(self) -> dict[str, Any]:
        """Return the message as the job's record stores it.

        Parts that are all text are joined into one string, because the templates of most models support only strings.
        """
        if isinstance(self.content, str):
            return {"role": self.role, "content": self.content}
        parts = [part.to_record() for part in self.content]
        text_only = all(part["type"] == "text" for part in parts)
        return {"role": self.role, "content": "\n".join(part["text"] for part in parts) if text_only else parts}


def _only(present: str, absent: str) -> dict[str, Any]:
    """Return a JSON schema of objects that have one of two fields."""
    return {"required": [present], "properties": {present: {"not": {"type": "null"}}, absent: {"type": "null"}}}


class JobRequest(RequestModel):
    """A generation request: either `prompt`, or `messages` for the model's chat template."""

    model_config = ConfigDict(json_schema_extra={"oneOf": [_only("prompt", "messages"), _only("messages", "prompt")]})

    model: str | None = Field(
        None, min_length=1, max_length=256, description="Id or alias of a model. Default: the service's default model"
    )
    prompt: str | None = Field(
        None,
        min_length=1,
        description="A question or instruction; instead of `messages`. It goes through the model's chat template as a "
        "user message. Models without a template continue it, and `raw` makes every model continue it",
    )
    messages: list[Message] | None = Field(
        None,
        min_length=1,
        max_length=MAX_MESSAGES,
        fail_fast=True,
        validate_default=True,
        description="The conversation to continue; instead of `prompt`",
    )
    images: list[Annotated[str, StringConstraints(min_length=1)]] = Field(
        [],
        max_length=1000,
        description="Images to place before the prompt or at the beginning of the last user message. Each is a data "
        "URL, or an http(s) URL if the service allows it",
    )
    max_tokens: int | None = Field(
        None, ge=1, le=2**31 - 1, description="Maximum tokens to generate. Default: the model's, then the service's"
    )
    temperature: float | None = Field(
        None,
        ge=0,
        le=2,
        description="Sampling temperature; 0 always selects the most likely token. Default: the model's, then the "
        "service's",
    )
    top_p: float = Field(
        1.0, gt=0, le=1, description="Sample from the most likely tokens whose probabilities sum to this value"
    )
    top_k: int = Field(0, ge=0, le=2**31 - 1, description="Sample from this many most likely tokens; 0 for all")
    min_p: float = Field(
        0.0, ge=0, le=1, description="Minimum probability of a token, relative to that of the most likely token"
    )
    repetition_penalty: float = Field(
        1.0, gt=0, le=10, description="Above 1, tokens among the last 20 of prompt and output become less likely"
    )
    presence_penalty: float = Field(
        0.0,
        ge=-2,
        le=2,
        description="Subtracted once from the logit of each token among the last 20 of prompt and output",
    )
    frequency_penalty: float = Field(
        0.0,
        ge=-2,
        le=2,
        description="Subtracted from a token's logit for each time that it is among the last 20 of prompt and output",
    )
    seed: int | None = Field(
        None, ge=0, lt=2**63, description="The same request with the same seed gives the same text. Default: random"
    )
    stop: Stop = Field(
        [],
        description=f"Up to {MAX_STOPS} strings that end the text; they are not part of it. Together at most "
        f"{MAX_STOP_BYTES} bytes",
    )
    priority: PriorityName = Field("normal", description="Jobs of a higher priority always start first")
    start_within_s: float | None = Field(
        None,
        gt=0,
        description="Seconds from submission within which the job must start, otherwise it expires. Default: the "
        "service's",
    )
    deadline_s: float | None = Field(
        None,
        gt=0,
        description="Seconds from submission within which the job must end, otherwise it expires. Default: the "
        "service's",
    )
    metadata: Metadata = Field({}, description="Strings that are stored and returned with the job")
    parse: Literal["ui_tars"] | None = Field(
        None,
        description="`ui_tars`: also return the actions in the text as structured data, with coordinates in pixels of "
        "the last image",
    )
    share_system_prompt: bool = Field(
        False,
        description="Share the cached prefix of the system message with all API keys that send the same one with this "
        "option. These keys start faster, and can tell from the timing that another key has used it. Messages after "
        "the system message are never shared",
    )
    logprobs: int | None = Field(
        None,
        ge=0,
        le=MAX_LOGPROBS,
        description="Return the log-probability of each generated token and of this many most likely tokens at its "
        f"position (0 to {MAX_LOGPROBS})",
    )

    raw: bool = Field(
        False, description="Continue `prompt` directly, without the model's chat template; not possible with images"
    )

    @field_validator("messages")
    @classmethod
    def _one_prompt(cls, messages: list[Message] | None, info: ValidationInfo) -> list[Message] | None:
        if "prompt" in info.data and (info.data["prompt"] is None) == (messages is None):
            raise PydanticCustomError("prompt_or_messages", "Send either prompt or messages, and not both")
        if messages is not None and all(message.is_empty for message in messages):
            raise PydanticCustomError("empty_messages", "At least one message must have text or an image")
        if messages and messages[-1].role == "assistant":
            # The template would close this message, and the model would begin another one of the assistant.
            raise PydanticCustomError(
                "assistant_last", "The last message must not be from the assistant: use a user message last"
            )
        return messages

    @field_validator("stop")
    @classmethod
    def _stops_are_short(cls, stops: list[str]) -> list[str]:
        if sum(len(stop.encode(errors="surrogatepass")) for stop in stops) > MAX_STOP_BYTES:
            message = "All stop strings together can have at most {limit} bytes in UTF-8"
            raise PydanticCustomError("stops_too_long", message, {"limit": MAX_STOP_BYTES})
        return stops

    @field_validator("share_system_prompt")
    @classmethod
    def _system_message_first(cls, share: bool, info: ValidationInfo) -> bool:
        if share and not ((messages := info.data.get("messages")) and messages[0].role == "system"):
            message = "The first of the messages must be a system message to share it"
            raise PydanticCustomError("no_system_prompt", message)
        return share

    @field_validator("raw")
    @classmethod
    def _raw_needs_prompt(cls, raw: bool, info: ValidationInfo) -> bool:
        if raw and info.data.get("messages"):
            raise PydanticCustomError("no_raw_prompt", "raw needs a prompt; messages always use the chat template")
        return raw

    @property
    def prompt_field(self) -> str:
        """Name of the field that has the prompt."""
        return "messages" if self.prompt is None else "prompt"

    @property
    def image_parts(self) -> list[tuple[str, Part]]:
        """The image parts of all messages, each with its path in the request."""
        return [
            (f"messages[{i}].content[{k}]", part)
            for i, message in enumerate(self.messages or [])
            if not isinstance(message.content, str)
            for k, part in enumerate(message.content)
            if part.type != "text"
        ]

    def canonical_json(self, model_id: str | None = None, model_defaults: Collection[str] = ()) -> str:
        """Return JSON that is equal for all equivalent requests: names are sorted, default values omitted.

        Args:
            model_id: id of the requested model, which the request may name by an alias.
            model_defaults: fields for which this model has a default. For these, sending the API's default value
                differs from omitting the field.
        """
        fields = self.model_dump(mode="json", exclude_defaults=True, exclude={"messages"})
        fields |= self.model_dump(mode="json", include=self.model_fields_set & set(model_defaults), exclude_none=True)
        if self.model:
            fields["model"] = model_id or self.model
        if self.messages:
            fields["messages"] = [message.to_record() for message in self.messages]
        return json.dumps(fields, sort_keys=True)

    def chat_messages(self) -> tuple[dict[str, Any], ...] | None:
        """Return the messages as the job's record stores them; None if the request has a prompt instead."""
        return tuple(message.to_record() for message in self.messages) if self.messages else None


class InferenceRequest(JobRequest):
    """A generation request whose result is returned in the response."""

    stream: bool = Field(False, description="Respond with a stream of events instead of the complete result")
