"""Generation requests, as clients send them."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BeforeValidator,
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
MAX_METADATA = 16
MAX_MESSAGES = 10_000
MAX_LOGPROBS = 20

StopString = Annotated[str, StringConstraints(min_length=1, max_length=1000)]
Stop = Annotated[
    list[StopString],
    Field(max_length=MAX_STOPS),
    # One string means a list of one. Told by a validator rather than a union: errors then name the element.
    BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "minLength": 1},
                {"type": "array", "items": {"type": "string", "minLength": 1}, "maxItems": MAX_STOPS},
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


class ImageUrl(RequestModel):
    """Where an image is, as OpenAI's clients send it."""

    url: str = Field(min_length=1, description="A data URL; http(s) where the service allows it")
    detail: Literal["auto", "low", "high"] = Field("auto", description="Taken, and without effect")


class Part(RequestModel):
    """A part of what is said: text, or an image in OpenAI's form (`image_url`) or a shorter one (`image`)."""

    type: Literal["text", "image_url", "image"]
    text: str | None = None
    image_url: Annotated[
        ImageUrl | None, BeforeValidator(lambda url: {"url": url} if isinstance(url, str) else url)
    ] = None
    image: str | None = Field(None, min_length=1, description="A data URL; http(s) where the service allows it")

    @model_validator(mode="after")
    def _what_its_type_says(self) -> Self:
        given = {name for name in ("text", "image_url", "image") if getattr(self, name) is not None}
        if given != {self.type}:
            raise PydanticCustomError("part", "A part of type {type} has {type} and nothing else", {"type": self.type})
        return self

    @property
    def source(self) -> str:
        """The URL of an image."""
        return self.image_url.url if self.image_url else self.image or ""

    def record(self) -> dict[str, Any]:
        """As a job's record has it; images are replaced by `StoredImage` before."""
        return {"type": "text", "text": self.text or ""}


class StoredImage(RequestModel):
    """What stands in a job's messages for an image: its digest and its size in pixels."""

    image: str
    width: int
    height: int

    def record(self) -> dict[str, Any]:
        """As a job's record has it."""
        return {"type": "image", **self.model_dump()}


def _text_or_parts(content: object) -> str:
    return "(text)" if isinstance(content, str) else "(parts)"


# In brackets: what is no name of a field is left out where an error tells the way to one.
Content = Annotated[
    Annotated[str, Tag("(text)")] | Annotated[list[Part], Field(min_length=1, max_length=1000), Tag("(parts)")],
    Discriminator(_text_or_parts),
]


class Message(RequestModel):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: Content

    @property
    def empty(self) -> bool:
        """Whether it says nothing and shows nothing."""
        if isinstance(self.content, str):
            return not self.content
        return not any(part.type != "text" or part.text for part in self.content)

    def record(self) -> dict[str, Any]:
        """As a job's record has it. Parts that are all text are one text: most models' templates know no parts."""
        if isinstance(self.content, str):
            return {"role": self.role, "content": self.content}
        parts = [part.record() for part in self.content]
        plain = all(part["type"] == "text" for part in parts)
        return {"role": self.role, "content": "\n".join(part["text"] for part in parts) if plain else parts}


class JobRequest(RequestModel):
    """A generation request: `prompt`, or `messages` for the model's chat template."""

    model: str | None = Field(None, min_length=1, max_length=256, description="Default: the service's model")
    prompt: str | None = Field(None, min_length=1, description="Plain text, instead of messages")
    messages: list[Message] | None = Field(
        None,
        min_length=1,
        max_length=MAX_MESSAGES,
        fail_fast=True,
        validate_default=True,
        description="A conversation to answer",
    )
    images: list[Annotated[str, StringConstraints(min_length=1)]] = Field(
        [],
        max_length=1000,
        description="Data URLs of images (http(s) where the service allows it), shown before the prompt or before the "
        "last thing that the user says",
    )
    max_tokens: int | None = Field(None, ge=1, le=2**31 - 1, description="Most tokens to generate")
    temperature: float | None = Field(None, ge=0, le=2, description="0 takes the likeliest token each time")
    top_p: float = Field(1.0, gt=0, le=1, description="Sample from the likeliest tokens of this total probability")
    top_k: int = Field(0, ge=0, le=2**31 - 1, description="Sample from this many likeliest tokens; 0: from all")
    min_p: float = Field(0.0, ge=0, le=1, description="Least probability, relative to the likeliest token's")
    repetition_penalty: float = Field(1.0, gt=0, le=10, description="Above 1, tokens seen before get less likely")
    presence_penalty: float = Field(0.0, ge=-2, le=2, description="Taken from the logits of tokens generated before")
    frequency_penalty: float = Field(0.0, ge=-2, le=2, description="The same, times how often")
    seed: int | None = Field(None, ge=0, lt=2**63, description="The same seed gives the same text; default: random")
    stop: Stop = Field([], description=f"Ends the text before any of these, at most {MAX_STOPS}")
    priority: PriorityName = Field("normal", description="A higher class is always served first")
    start_within_s: float | None = Field(
        None, gt=0, description="Expires when it has not started by then; once it has, only the deadline counts"
    )
    deadline_s: float | None = Field(None, gt=0, description="Expires when it takes longer in all, waiting included")
    metadata: Metadata = Field({}, description="Kept with the job and given back")
    parse: Literal["ui_tars"] | None = Field(
        None,
        description="`ui_tars`: give the answer's actions as data, too, with places in the image's own pixels",
    )
    share_system_prompt: bool = Field(
        False,
        description="Let jobs of all keys that begin with the same system message start as fast as if it were their "
        "own; they can tell that somebody sent it. Nothing behind it is shared",
    )

    logprobs: int | None = Field(
        None,
        ge=0,
        le=MAX_LOGPROBS,
        description="Give the log-probability of each token, and of so many of the likeliest tokens at its place "
        f"(0 to {MAX_LOGPROBS}); null: none",
    )

    @field_validator("messages")
    @classmethod
    def _one_prompt(cls, messages: list[Message] | None, info: ValidationInfo) -> list[Message] | None:
        if "prompt" in info.data and (info.data["prompt"] is None) == (messages is None):
            raise PydanticCustomError("prompt_or_messages", "Exactly one of prompt and messages is needed")
        if messages is not None and all(message.empty for message in messages):
            raise PydanticCustomError("empty_messages", "No message holds any text")
        return messages

    @field_validator("share_system_prompt")
    @classmethod
    def _system_prompt_to_share(cls, share: bool, info: ValidationInfo) -> bool:
        if share and not ((messages := info.data.get("messages")) and messages[0].role == "system"):
            raise PydanticCustomError("no_system_prompt", "It needs messages of which the first is the system's")
        return share

    @property
    def prompt_field(self) -> str:
        """The field that the prompt came in."""
        return "messages" if self.prompt is None else "prompt"

    @property
    def image_parts(self) -> list[tuple[str, Part]]:
        """The images among the parts of its messages, each with the way to it."""
        return [
            (f"messages[{i}].content[{k}]", part)
            for i, message in enumerate(self.messages or [])
            if not isinstance(message.content, str)
            for k, part in enumerate(message.content)
            if part.type != "text"
        ]

    def meaning(self, model: str | None = None, settled: Collection[str] = ()) -> str:
        """The request as a line that is the same for all ways to write it: sorted, and without what is default.

        Args:
            model: the id of the model that it names, maybe by an alias.
            settled: what this model has defaults of its own for: there, the API's is an answer like any other.
        """
        meant = self.model_dump(mode="json", exclude_defaults=True, exclude={"messages"})
        meant |= self.model_dump(mode="json", include=self.model_fields_set & set(settled), exclude_none=True)
        if self.model:
            meant["model"] = model or self.model
        if self.messages:
            meant["messages"] = [message.record() for message in self.messages]
        return json.dumps(meant, sort_keys=True)

    def conversation(self, *, has_template: bool) -> tuple[dict[str, Any], ...] | None:
        """The messages for the model's chat template; None when the prompt goes to the model as it is."""
        del has_template
        return tuple(message.record() for message in self.messages) if self.messages else None


class InferenceRequest(JobRequest):
    """A generation request to be answered on the same connection; its prompt is a question to the model."""

    stream: bool = Field(False, description="Send the text as it comes")
    raw: bool = Field(
        False, description="Go on from the prompt as it is, without the model's chat template; not with images"
    )

    @field_validator("raw")
    @classmethod
    def _prompt_to_go_on_from(cls, raw: bool, info: ValidationInfo) -> bool:
        if raw and info.data.get("messages"):
            raise PydanticCustomError("no_raw_prompt", "It needs a prompt; messages go through the chat template")
        return raw

    def conversation(self, *, has_template: bool) -> tuple[dict[str, Any], ...] | None:
        """As for a job, but a prompt is what a user says, unless it is raw or the model knows no conversations."""
        if self.prompt is not None and not self.messages and has_template and not self.raw:
            return ({"role": "user", "content": self.prompt},)
        return super().conversation(has_template=has_template)
