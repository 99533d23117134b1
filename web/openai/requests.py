"""Request bodies of chat completions and text completions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Final, Literal, TypeAlias

from pydantic import (
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    ValidationInfo,
    field_validator,
)
from pydantic_core import PydanticCustomError

from web.schemas.base import RequestModel
from web.schemas.messages import Message
from web.schemas.openai_fields import Advice, SampledRequest, Unsupported, refuse
from web.schemas.requests import MAX_LOGPROBS, MAX_MESSAGES
from web.schemas.response_format import ResponseFormat
from web.schemas.template_options import AdapterName, LogitBias, ReasoningEffort, TemplateVariables
from web.schemas.tools import ToolChoice, Tools

MAX_CHOICES: Final = 128
"""Maximum jobs of one request."""

_Integer: TypeAlias = Annotated[int, Field(ge=0, lt=2**31)]


class StreamOptions(RequestModel):
    """What a stream contains."""

    include_usage: bool = Field(False, description="Send a last chunk with the token counts")
    include_obfuscation: Advice = None


class GenerationRequest(SampledRequest):
    """The fields that requests for chat and text completions have in common."""

    model: str | None = Field(
        None, min_length=1, max_length=256, description="Id or alias of a model. Default: the service's default model"
    )
    adapter: AdapterName = None
    max_tokens: int | None = Field(
        None, ge=1, le=2**31 - 1, description="Maximum tokens to generate. Default: the rest of the model's context"
    )
    repetition_penalty: float = Field(1.0, gt=0, le=10)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    logit_bias: LogitBias = Field({})
    n: int = Field(1, ge=1, le=MAX_CHOICES, description="Number of choices; with a seed, choice i uses seed + i")
    stream_options: StreamOptions | None = Field(None, description="Allowed only with `stream`")
    user: Advice = None


class ChatMessage(Message):
    """A message of a conversation. Messages of earlier answers can be sent back as they were received."""

    annotations: Advice = None
    refusal: Unsupported = None
    audio: Unsupported = None
    function_call: Unsupported = None


class ChatRequest(GenerationRequest):
    """A request for the next message of a conversation."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    max_completion_tokens: int | None = Field(
        None, ge=1, le=2**31 - 1, description="The same as `max_tokens`, which OpenAI has deprecated"
    )
    logprobs: bool = Field(False, description="Return the log-probabilities of the tokens of `content`")
    top_logprobs: int | None = Field(
        None, ge=0, le=MAX_LOGPROBS, description="Alternatives for each token; needs `logprobs`"
    )
    response_format: ResponseFormat | None = None
    regex: str | None = Field(None, description="The same as `response_format` of type `regex`")
    choice: list[str] | None = Field(None, description="The same as `response_format` of type `choice`")
    grammar: str | None = Field(None, description="The same as `response_format` of type `grammar`")
    tools: Tools | None = None
    tool_choice: ToolChoice = "auto"
    parallel_tool_calls: bool = True
    reasoning_effort: ReasoningEffort | None = None
    enable_thinking: bool | None = Field(None, description="Whether the model reasons before it answers")
    thinking_budget: int | None = Field(None, ge=0, le=2**31 - 1, description="Maximum tokens of reasoning")
    chat_template_kwargs: TemplateVariables = Field({}, description="Variables for the model's chat template")
    continue_final_message: bool = Field(
        False, description="Continue the last message, which is from the assistant, instead of beginning a new one"
    )
    modalities: list[Literal["text"]] | None = Field(None, min_length=1)
    store: Advice = None
    prediction: Advice = None
    prompt_cache_key: Advice = None
    prompt_cache_options: Advice = None
    prompt_cache_retention: Advice = None
    safety_identifier: Advice = None
    verbosity: Advice = None
    audio: Unsupported = None
    function_call: Unsupported = None
    functions: Unsupported = None
    moderation: Unsupported = None
    web_search_options: Unsupported = None

    @field_validator("max_completion_tokens")
    @classmethod
    def _one_limit(cls, limit: int | None, info: ValidationInfo) -> int | None:
        if limit is not None and info.data.get("max_tokens") not in (None, limit):
            raise PydanticCustomError("two_limits", "max_completion_tokens differs from max_tokens; send one of them")
        return limit

    @field_validator("top_logprobs")
    @classmethod
    def _needs_logprobs(cls, top: int | None, info: ValidationInfo) -> int | None:
        if top is not None and not info.data.get("logprobs"):
            raise PydanticCustomError("no_logprobs", "top_logprobs needs logprobs to be true")
        return top

    @field_validator("regex", "choice", "grammar")
    @classmethod
    def _one_format(cls, value: Any, info: ValidationInfo) -> Any:
        others = (info.data.get(name) for name in ("response_format", "regex", "choice", "grammar"))
        if value is not None and any(other is not None for other in others):
            raise PydanticCustomError("two_formats", "Send only one of response_format, regex, choice and grammar")
        return value


def _prompt_tag(prompt: object) -> str:
    """Return the tag for a prompt's type. Brackets omit it from the path of an invalid field."""
    first = prompt[0] if isinstance(prompt, list) and prompt else None
    if not isinstance(prompt, list):
        return "(text)"
    return "(lists)" if isinstance(first, list) else "(tokens)" if isinstance(first, int) else "(texts)"


_Text: TypeAlias = Annotated[str, StringConstraints(min_length=1)]
_Tokens: TypeAlias = Annotated[list[_Integer], Field(min_length=1, fail_fast=True)]
Prompt: TypeAlias = Annotated[
    Annotated[_Text, Tag("(text)")]
    | Annotated[list[_Text], Field(min_length=1, max_length=MAX_CHOICES), Tag("(texts)")]
    | Annotated[_Tokens, Tag("(tokens)")]
    | Annotated[list[_Tokens], Field(min_length=1, max_length=MAX_CHOICES), Tag("(lists)")],
    Discriminator(_prompt_tag),
]


class CompletionRequest(GenerationRequest):
    """A request for the continuation of texts. The chat template is not used."""

    prompt: Prompt = Field(description="A text or a list of token ids, or a list of several of these")
    logprobs: int | None = Field(
        None, ge=0, le=MAX_LOGPROBS, description="Return log-probabilities, with this many alternatives for each token"
    )
    best_of: int | None = Field(None, description="Refused unless it equals `n`")
    echo: bool = Field(False, description="Refused if true")
    suffix: str = Field("", description="Refused unless empty")

    @field_validator("best_of", "echo", "suffix")
    @classmethod
    def _has_no_effect(cls, value: Any, info: ValidationInfo) -> Any:
        if value and not (info.field_name == "best_of" and value == info.data.get("n")):
            refuse(value)
        return value

    @field_validator("prompt")
    @classmethod
    def _few_choices(cls, prompt: Any, info: ValidationInfo) -> Any:
        if len(list(_prompts(prompt))) * info.data.get("n", 1) > MAX_CHOICES:
            message = "prompts times n can be at most {limit}"
            raise PydanticCustomError("too_many_choices", message, {"limit": MAX_CHOICES})
        return prompt

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, each a text or token ids."""
        return list(_prompts(self.prompt))


def _prompts(prompt: Any) -> Iterator[str | list[int]]:
    if isinstance(prompt, list) and not isinstance(prompt[0], int):
        yield from prompt
    else:
        yield prompt
