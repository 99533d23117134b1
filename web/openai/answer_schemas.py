"""Response bodies of the OpenAI API, for the OpenAPI document."""

from __future__ import annotations

from typing import Final, Literal

from pydantic import ConfigDict, Field

from web.schemas.base import ResponseModel
from web.schemas.jobs import ToolCallView


class TopLogprob(ResponseModel):
    """A likely token at a position of the content."""

    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(TopLogprob):
    """A token of the content."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(ResponseModel):
    """The log-probabilities of a message's content."""

    content: list[ChatLogprob]
    refusal: None


_SOME_ABSENT: Final = ConfigDict(json_schema_serialization_defaults_required=False)
"""For models in which fields with a default may be absent."""


class ChatAnswerMessage(ResponseModel):
    """The answer."""

    model_config = _SOME_ABSENT

    role: Literal["assistant"]
    content: str | None = Field(description="Null if there is none next to tool calls")
    reasoning_content: str = Field("", description="The reasoning before the content; absent if there is none")
    tool_calls: list[ToolCallView] = Field([], description="Absent if there are none")
    refusal: None


class ChatChoice(ResponseModel):
    """A choice of a chat completion."""

    index: int
    message: ChatAnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class PromptDetails(ResponseModel):
    """Details of the prompt's tokens."""

    cached_tokens: int = Field(description="Tokens that the prefix cache supplied")


class CompletionDetails(ResponseModel):
    """Details of the generated tokens."""

    reasoning_tokens: int


class CompletionUsage(ResponseModel):
    """The token counts of all choices together. A prompt counts once."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails


class ChatCompletion(ResponseModel):
    """A chat completion."""

    model_config = _SOME_ABSENT

    id: str = Field(description="`chatcmpl-` and the id of the job")
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    service_tier: str = Field("", description="Absent unless the request has it")
    choices: list[ChatChoice]
    usage: CompletionUsage


class CompletionLogprobs(ResponseModel):
    """The log-probabilities of a completion's tokens."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(ResponseModel):
    """A choice of a text completion."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]


class Completion(ResponseModel):
    """A text completion."""

    model_config = _SOME_ABSENT

    id: str = Field(description="`cmpl-` and the id of the job")
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    service_tier: str = Field("", description="Absent unless the request has it")
    choices: list[CompletionChoice]
    usage: CompletionUsage
