"""Requests and responses of the Messages API, and which fields have an effect."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import Discriminator, Field, Tag, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from web.anthropic.blocks import MAX_BLOCKS, Block, Cacheable, CacheControl, TextBlock, by_type, text_or_blocks
from web.schemas.base import RequestModel, ResponseModel
from web.schemas.requests import MAX_MESSAGES, MAX_STOPS, StopString
from web.schemas.template_options import AdapterName

_ROLES: Final = {
    "user": {"text", "image", "document", "tool_result"},
    "assistant": {"text", "thinking", "tool_use"},
    "system": {"text"},
}
"""The types of blocks that a message may have, by its role."""

Text = Annotated[
    Annotated[str, Tag("(text)")] | Annotated[list[TextBlock], Field(max_length=MAX_BLOCKS), Tag("(blocks)")],
    Discriminator(text_or_blocks),
]


class Message(RequestModel):
    """A message of a conversation."""

    role: Literal["user", "assistant", "system"]
    content: Annotated[
        Annotated[str, Tag("(text)")] | Annotated[list[Block], Field(max_length=MAX_BLOCKS), Tag("(blocks)")],
        Discriminator(text_or_blocks),
    ]

    @field_validator("content")
    @classmethod
    def _blocks_fit_the_role(cls, content: str | list[Any], info: ValidationInfo) -> str | list[Any]:
        role = info.data.get("role")
        if role and not isinstance(content, str):
            for block in content:
                if block.type not in _ROLES[role]:
                    message = "A message of the role {role} cannot have a block of type {type}"
                    raise PydanticCustomError("block_in_role", message, {"role": role, "type": block.type})
        return content

    @property
    def blocks(self) -> list[Any]:
        """The content as a list of blocks."""
        return [TextBlock(type="text", text=self.content)] if isinstance(self.content, str) else self.content


class Tool(Cacheable):
    """A tool that the client runs."""

    type: Literal["custom"] = "custom"
    name: str = Field(min_length=1, max_length=128)
    description: str | None = None
    input_schema: dict[str, Any] = Field(description="JSON schema of the tool's input")
    strict: bool = Field(False, description="Whether the input of every call must satisfy the schema")
    eager_input_streaming: bool | None = Field(None, description="Accepted as advice; has no effect")
    defer_loading: Literal[False] = False
    allowed_callers: list[Literal["direct"]] | None = None


class AutoChoice(RequestModel):
    """The model may call tools."""

    type: Literal["auto"]
    disable_parallel_tool_use: bool = False


class AnyChoice(RequestModel):
    """The model must call a tool."""

    type: Literal["any"]
    disable_parallel_tool_use: bool = False


class ToolChoice(RequestModel):
    """The model must call this tool."""

    type: Literal["tool"]
    name: str
    disable_parallel_tool_use: bool = False


class NoChoice(RequestModel):
    """The model may not call tools."""

    type: Literal["none"]
    disable_parallel_tool_use: bool = False


Choice = Annotated[
    Annotated[AutoChoice, Tag("(auto)")]
    | Annotated[AnyChoice, Tag("(any)")]
    | Annotated[ToolChoice, Tag("(tool)")]
    | Annotated[NoChoice, Tag("(none)")],
    by_type("auto, any, tool, none"),
]


class _ThinkingDisplay(RequestModel):
    display: Literal["summarized", "omitted"] = Field(
        "summarized", description="`omitted`: thinking blocks have no text. Otherwise they have all of it"
    )


class ThinkingEnabled(_ThinkingDisplay):
    """The model thinks first, for at most `budget_tokens`."""

    type: Literal["enabled"]
    budget_tokens: int = Field(ge=1, le=2**31 - 1)


class ThinkingAdaptive(_ThinkingDisplay):
    """The model thinks as long as it needs."""

    type: Literal["adaptive"]


class ThinkingDisabled(RequestModel):
    """The model does not think, if its chat template allows that. Otherwise its thoughts are left out."""

    type: Literal["disabled"]


Thinking = Annotated[
    Annotated[ThinkingEnabled, Tag("(enabled)")]
    | Annotated[ThinkingAdaptive, Tag("(adaptive)")]
    | Annotated[ThinkingDisabled, Tag("(disabled)")],
    by_type("enabled, adaptive, disabled"),
]


class JsonFormat(RequestModel):
    """The answer is JSON that satisfies a schema."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(RequestModel):
    """How the model answers."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = Field(
        None, description="Reasoning effort, for models whose chat template knows it"
    )
    format: JsonFormat | None = None


class RequestMetadata(RequestModel):
    """Stored with the job as its metadata."""

    user_id: str | None = Field(None, min_length=1, max_length=512)


class ClearThinking(RequestModel):
    """Which earlier thinking the model reads; the chat template of the model decides, which often means none."""

    type: Literal["clear_thinking_20251015"]
    keep: Any = None


class ContextManagement(RequestModel):
    """Edits of the conversation. Only `clear_thinking_20251015` is accepted, as advice."""

    edits: list[ClearThinking] | None = None


class CountRequest(RequestModel):
    """A conversation whose tokens are counted."""

    model: str = Field(min_length=1, max_length=256, description="Id or alias of a model")
    adapter: AdapterName = None
    messages: list[Message] = Field(
        min_length=1,
        max_length=MAX_MESSAGES,
        fail_fast=True,
        description="The conversation. If the last message is from the assistant, the answer continues it",
    )
    system: Text | None = Field(None, description="The system prompt")
    tools: list[Tool] | None = Field(None, description="Tools that the client runs")
    tool_choice: Choice | None = Field(None, description="Whether the model must call a tool. Default: `auto`")
    thinking: Thinking | None = Field(None, description="Default: `disabled`")
    output_config: OutputConfig | None = None
    cache_control: CacheControl | None = None
    context_management: ContextManagement | None = Field(None, description="Accepted as advice")
    speed: Literal["standard", "fast"] | None = Field(None, description="Accepted as advice; has no effect")


class MessagesRequest(CountRequest):
    """A request for the next message of a conversation."""

    max_tokens: int = Field(
        ge=1, le=2**31 - 1, description="Maximum tokens to generate; more than the model's context means all of it"
    )
    stop_sequences: list[StopString] = Field([], max_length=MAX_STOPS, description="Strings that end the answer")
    stream: bool = Field(False, description="Respond with a stream of events")
    temperature: float | None = Field(None, ge=0, le=2, description="Default: the model's, then the service's")
    top_p: float | None = Field(None, gt=0, le=1, description="Default: the model's, otherwise 1")
    top_k: int | None = Field(None, ge=0, le=2**31 - 1, description="Default: the model's, otherwise all tokens")
    metadata: RequestMetadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = Field(
        None, description="Accepted as advice; the API key and the queue decide"
    )
    inference_geo: str | None = Field(None, description="Accepted as advice; has no effect")
    diagnostics: dict[str, Any] | None = Field(None, description="Accepted as advice; has no effect")

    @field_validator("max_tokens")
    @classmethod
    def _budget_is_smaller(cls, max_tokens: int, info: ValidationInfo) -> int:
        thinking = info.data.get("thinking")
        if isinstance(thinking, ThinkingEnabled) and thinking.budget_tokens >= max_tokens:
            raise PydanticCustomError("budget_too_large", "max_tokens must be greater than thinking.budget_tokens")
        return max_tokens


StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"]


class OutputDetails(ResponseModel):
    """Parts of the generated tokens."""

    thinking_tokens: int


class MessageUsage(ResponseModel):
    """Token counts. The prompt's tokens are the sum of the three counts of input tokens."""

    input_tokens: int
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int = Field(0, description="Prompt tokens that the prefix cache supplied")
    output_tokens: int
    output_tokens_details: OutputDetails | None = None


class AnthropicMessage(ResponseModel):
    """The model's answer."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[dict[str, Any]] = Field(description="Blocks of the types `thinking`, `text` and `tool_use`")
    stop_reason: StopReason | None = None
    stop_sequence: str | None = Field(None, description="The stop sequence that ended the answer")
    usage: MessageUsage


class TokenCount(ResponseModel):
    """The number of tokens of a prompt."""

    input_tokens: int
