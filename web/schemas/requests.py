"""Generation requests."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Annotated, Any, Final, Literal

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
)
from pydantic_core import PydanticCustomError

from web.schemas.base import RequestModel
from web.schemas.messages import Message, Part, check_results
from web.schemas.response_format import ResponseFormat
from web.schemas.template_options import AdapterName, LogitBias, ReasoningEffort, TemplateVariables, check_no_conflict
from web.schemas.tools import ToolChoice, Tools, check_choice
from web.schemas.webhooks import JobEvent

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


class ParseOptions(RequestModel):
    """How the answer is parsed, if its coordinates do not refer to what is usual for the model's type."""

    format: Literal["ui_tars", "computer_use", "grounding"] = Field(description="See `parse`")
    coordinates: Literal["thousandths", "resized", "pixels"] | None = Field(
        None,
        description="What the coordinates in the answer refer to: thousandths of the image's width and height, pixels "
        "of the image after the model's own resizing (only Qwen's vision models), or pixels of the image as it was "
        "sent. Default: by the model's type",
    )


def _parse_tag(parse: object) -> str:
    return "(options)" if isinstance(parse, dict | ParseOptions) else "(name)"


Parse = Annotated[
    Annotated[Literal["ui_tars", "computer_use", "grounding", "message"], Tag("(name)")]
    | Annotated[ParseOptions, Tag("(options)")],
    Discriminator(_parse_tag),
]
_PROMPTS: Final = ("prompt", "messages", "prompt_tokens")


def _only(present: str) -> dict[str, Any]:
    """Return a JSON schema of objects that have one of the fields with a prompt."""
    absent = {name: {"type": "null"} for name in _PROMPTS if name != present}
    return {"required": [present], "properties": {present: {"not": {"type": "null"}}, **absent}}


class JobRequest(RequestModel):
    """A generation request: `prompt`, `messages` for the model's chat template, or `prompt_tokens`."""

    model_config = ConfigDict(json_schema_extra={"oneOf": [_only(name) for name in _PROMPTS]})

    model: str | None = Field(
        None,
        min_length=1,
        max_length=256,
        description="Id or alias of a model, optionally with `:adapter`. Default: the service's default model",
    )
    adapter: AdapterName = None
    prompt: str | None = Field(
        None,
        min_length=1,
        description="A question or instruction; instead of `messages`. It goes through the model's chat template as a "
        "user message. Models without a template continue it, and `raw` makes every model continue it",
    )
    prompt_tokens: list[Annotated[int, Field(ge=0, lt=2**31)]] | None = Field(
        None,
        min_length=1,
        fail_fast=True,
        description="Token ids to continue; instead of `prompt`. No token is added",
    )
    continue_final_message: bool = Field(
        False, description="Continue the last message, which is from the assistant, instead of beginning a new one"
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
        None,
        ge=1,
        le=2**31 - 1,
        description="Maximum tokens to generate. Default: the model's, then the service's if it has one, then the rest "
        "of the model's context",
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
    webhook_url: str | None = Field(
        None,
        min_length=1,
        max_length=2048,
        description="Where to send a webhook when the job has ended: http(s), with public addresses unless the service "
        "allows others. `GET /v1/webhooks/secret` has the secret that signs it",
    )
    webhook_events: list[JobEvent] | None = Field(
        None, min_length=1, max_length=4, description="The events to send to `webhook_url`. Default: all"
    )
    tools: Tools | None = Field(None, description="Functions that the model may call")
    tool_choice: ToolChoice = Field(
        "auto",
        validate_default=True,
        description="`auto`: the model decides; `none`: it calls no tool; `required`: it calls at least one; or the "
        "tool that it calls",
    )
    parallel_tool_calls: bool = Field(True, description="Allow several tool calls in one answer")
    response_format: ResponseFormat | None = Field(
        None, description="The form that the answer must have. Default: any text"
    )
    chat_template_kwargs: TemplateVariables = Field(
        {}, description="Variables for the model's chat template, in addition to those of the catalog"
    )
    enable_thinking: bool | None = Field(
        None, description="Whether the model reasons before it answers. Default: as its chat template decides"
    )
    reasoning_effort: ReasoningEffort | None = Field(
        None,
        description="How much the model reasons, for models whose chat template has this option. For other models that "
        "reason, `none` turns reasoning off, and other values have no effect",
    )
    thinking_budget: int | None = Field(
        None, ge=0, le=2**31 - 1, description="Maximum tokens of reasoning; then the model must answer"
    )
    logit_bias: LogitBias = Field(
        {}, description="Values from -100 to 100 that are added to the logits of tokens, by token id"
    )
    parse: Parse | None = Field(
        None,
        description="`message`: also return the answer as a message, with reasoning and tool calls separated from the "
        "text. The other values also return structured data from the text, with coordinates in pixels of the last "
        "image: `ui_tars` the actions of UI-TARS, `computer_use` the calls of `computer_use` and `mobile_use` (Qwen), "
        "`grounding` points and boxes in JSON. An object instead of the name says what the coordinates refer to",
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
        others = [info.data[name] for name in ("prompt", "prompt_tokens") if name in info.data]
        if len(others) == 2 and [*others, messages].count(None) != 2:
            raise PydanticCustomError("prompt_or_messages", "Send exactly one of prompt, messages and prompt_tokens")
        continues = info.data.get("continue_final_message", False)
        if continues and not (messages and messages[-1].can_be_continued):
            message = "continue_final_message needs messages, the last of which is a text of the assistant"
            raise PydanticCustomError("no_final_message", message)
        if messages is None:
            return None
        if all(message.is_empty for message in messages):
            raise PydanticCustomError("empty_messages", "At least one message must have text or an image")
        if messages[-1].role == "assistant" and not continues:
            # The template would close this message, and the model would begin another one of the assistant.
            raise PydanticCustomError(
                "assistant_last",
                "The last message must not be from the assistant: use a user message last, or continue_final_message",
            )
        check_results(messages)
        return messages

    @field_validator("tool_choice")
    @classmethod
    def _choice_is_a_tool(cls, choice: ToolChoice, info: ValidationInfo) -> ToolChoice:
        if "tools" in info.data:
            check_choice(choice, info.data["tools"])
        return choice

    @field_validator("enable_thinking", "reasoning_effort")
    @classmethod
    def _agrees_with_template_kwargs(cls, value: Any, info: ValidationInfo) -> Any:
        check_no_conflict(info.field_name or "", value, info.data.get("chat_template_kwargs", {}))
        return value

    @field_validator("webhook_events")
    @classmethod
    def _events_need_a_url(cls, events: list[JobEvent] | None, info: ValidationInfo) -> list[JobEvent] | None:
        if events and not info.data.get("webhook_url"):
            raise PydanticCustomError("no_webhook_url", "webhook_events needs webhook_url")
        return events

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
        if share and not ((messages := info.data.get("messages")) and messages[0].role in ("system", "developer")):
            message = "The first of the messages must be a system message to share it"
            raise PydanticCustomError("no_system_prompt", message)
        return share

    @field_validator("raw")
    @classmethod
    def _raw_needs_prompt(cls, raw: bool, info: ValidationInfo) -> bool:
        if raw and (info.data.get("messages") or info.data.get("prompt_tokens")):
            raise PydanticCustomError("no_raw_prompt", "raw needs a prompt; messages always use the chat template")
        return raw

    @property
    def skips_template(self) -> bool:
        """Whether the model continues the prompt without its chat template."""
        return self.raw or self.prompt_tokens is not None

    @property
    def prompt_field(self) -> str:
        """Name of the field that has the prompt."""
        return next((name for name in _PROMPTS if getattr(self, name) is not None), "messages")

    @property
    def image_parts(self) -> list[tuple[str, Part]]:
        """The image parts of all messages, each with its path in the request."""
        return [
            (f"messages[{i}].content[{k}]", part)
            for i, message in enumerate(self.messages or [])
            if isinstance(message.content, list)
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

    def tool_records(self) -> tuple[dict[str, Any], ...] | None:
        """Return the tools as the job's record stores them."""
        return tuple(tool.to_record() for tool in self.tools) if self.tools else None


class InferenceRequest(JobRequest):
    """A generation request whose result is returned in the response."""

    stream: bool = Field(False, description="Respond with a stream of events instead of the complete result")
