"""Request bodies of the Responses API."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal, TypeAlias

from pydantic import AfterValidator, Discriminator, Field, Tag, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from web.responses.items import MAX_ITEMS, Item, only_types, type_tag
from web.schemas.base import RequestModel
from web.schemas.openai_fields import Advice, SampledRequest, Unsupported
from web.schemas.requests import MAX_LOGPROBS
from web.schemas.response_format import Source
from web.schemas.template_options import AdapterName, ReasoningEffort, TemplateVariables
from web.schemas.tools import MAX_TOOLS, ToolName

Includable = Literal[
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "code_interpreter_call.outputs",
]
LOGPROBS: Final = "message.output_text.logprobs"
ENCRYPTED: Final = "reasoning.encrypted_content"


class FunctionTool(RequestModel):
    """A function that the model may call."""

    type: Literal["function"]
    name: ToolName = Field(description="Letters, digits, `_` and `-`; different for each tool")
    description: str | None = None
    parameters: dict[str, Any] | None = Field(
        None, description="JSON schema of the arguments. Default: the function takes none"
    )
    strict: bool | None = Field(None, description="Generate only arguments that satisfy `parameters`. Default: false")
    allowed_callers: Advice = None
    async_: Advice = Field(None, alias="async")
    defer_loading: Advice = None
    output_schema: Advice = None


class TextInput(RequestModel):
    """The input may be any text."""

    type: Literal["text"]


class GrammarInput(RequestModel):
    """The input is text of a grammar."""

    type: Literal["grammar"]
    syntax: Literal["lark", "regex"]
    definition: Source


class CustomTool(RequestModel):
    """A tool whose input is text."""

    type: Literal["custom"]
    name: ToolName = Field(description="Letters, digits, `_` and `-`; different for each tool")
    description: str | None = None
    format: Annotated[
        Annotated[TextInput, Tag("(text)")] | Annotated[GrammarInput, Tag("(grammar)")],
        Discriminator(type_tag),
        only_types("Formats", "text", "grammar"),
    ] = Field(TextInput(type="text"), description="What the input may be. Default: any text")
    allowed_callers: Advice = None
    async_: Advice = Field(None, alias="async")
    defer_loading: Advice = None


Tool: TypeAlias = Annotated[
    Annotated[FunctionTool, Tag("(function)")] | Annotated[CustomTool, Tag("(custom)")],
    Discriminator(type_tag),
    only_types("Tools", "function", "custom"),
]


class NamedTool(RequestModel):
    """A tool, by its name."""

    type: Literal["function", "custom"]
    name: ToolName


class AllowedTools(RequestModel):
    """The tools that the model may call in this answer. It sees no others."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[Annotated[NamedTool, only_types("Tools", "function", "custom")]] = Field(
        min_length=1, max_length=MAX_TOOLS
    )


def _choice_tag(choice: object) -> str:
    if isinstance(choice, str):
        return "(word)"
    return "(allowed_tools)" if type_tag(choice) == "(allowed_tools)" else "(tool)"


ToolChoice: TypeAlias = Annotated[
    Annotated[Literal["auto", "none", "required"], Tag("(word)")]
    | Annotated[NamedTool, Tag("(tool)")]
    | Annotated[AllowedTools, Tag("(allowed_tools)")],
    Discriminator(_choice_tag),
    only_types("Tool choices", "function", "custom", "allowed_tools"),
]


class PlainText(RequestModel):
    """Any text."""

    type: Literal["text"]


class JsonObject(RequestModel):
    """A JSON object."""

    type: Literal["json_object"]


class JsonSchema(RequestModel):
    """JSON that satisfies a schema."""

    type: Literal["json_schema"]
    name: str | None = Field(None, min_length=1, max_length=128, description="Accepted; has no effect")
    description: str | None = Field(None, description="Accepted; has no effect")
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = Field(None, description="Accepted; every schema is strict")


class TextConfig(RequestModel):
    """The form of the answer's text."""

    format: Annotated[
        Annotated[PlainText, Tag("(text)")]
        | Annotated[JsonObject, Tag("(json_object)")]
        | Annotated[JsonSchema, Tag("(json_schema)")],
        Discriminator(type_tag),
        only_types("Formats", "text", "json_object", "json_schema"),
    ] = Field(PlainText(type="text"))
    verbosity: Literal["low", "medium", "high"] = Field("medium", description="Accepted; has no effect")


class Reasoning(RequestModel):
    """How the model reasons, and how the answer shows it."""

    effort: ReasoningEffort | None = Field(
        None, description="For models whose chat template has it; for others, `none` turns reasoning off"
    )
    summary: Literal["auto", "concise", "detailed"] | None = Field(
        None, description="Show the reasoning as a summary, in full length, instead of as `content`"
    )
    generate_summary: Literal["auto", "concise", "detailed"] | None = Field(
        None, description="The same as `summary`, which has replaced it"
    )
    context: Advice = None
    mode: Literal["standard"] = "standard"


class StreamOptions(RequestModel):
    """What a stream contains."""

    include_obfuscation: Advice = None


def _distinct(tools: list[Tool]) -> list[Tool]:
    names = set[str]()
    for index, tool in enumerate(tools):
        if tool.name in names:
            message = "tools[{index}] has the same name as an earlier tool: {name}"
            raise PydanticCustomError("duplicate_tool", message, {"index": index, "name": tool.name})
        names.add(tool.name)
    return tools


def _input_tag(value: object) -> str:
    return "(text)" if isinstance(value, str) else "(items)"


Input: TypeAlias = Annotated[
    Annotated[str, Tag("(text)")] | Annotated[list[Item], Field(max_length=MAX_ITEMS, fail_fast=True), Tag("(items)")],
    Discriminator(_input_tag),
]


class PromptRequest(RequestModel):
    """The fields that describe the prompt."""

    model: str | None = Field(
        None, min_length=1, max_length=256, description="Id or alias of a model. Default: the service's default model"
    )
    adapter: AdapterName = None
    input: Input = Field("", description="A text, or a list of items")
    instructions: str | None = Field(None, description="The system message. Later responses do not inherit it")
    previous_response_id: str | None = Field(
        None, min_length=1, max_length=128, description="A stored response that this one continues"
    )
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True), AfterValidator(_distinct)] = Field([])
    tool_choice: ToolChoice = Field(
        "auto",
        description="`auto`: the model decides; `none`: it calls no tool; `required`: it calls at least one; or the "
        "tool that it calls, or the tools that it may call",
    )
    parallel_tool_calls: bool = Field(True, description="Allow several tool calls in one answer")
    text: TextConfig = Field(TextConfig())
    reasoning: Reasoning = Field(Reasoning())
    truncation: Literal["disabled"] = Field("disabled", description="`auto` is not supported")
    conversation: Unsupported = None

    @field_validator("tool_choice")
    @classmethod
    def _choice_is_a_tool(cls, choice: ToolChoice, info: ValidationInfo) -> ToolChoice:
        tools = info.data.get("tools")
        if tools is None or choice in ("auto", "none"):
            return choice
        if not tools:
            raise PydanticCustomError("no_tools", "tool_choice demands a tool, but the request has no tools")
        names = {(tool.type, tool.name) for tool in tools}
        wanted = choice.tools if isinstance(choice, AllowedTools) else [choice] if isinstance(choice, NamedTool) else []
        for each in wanted:
            if (each.type, each.name) not in names:
                message = "No tool in tools has the type {type} and the name {name}"
                raise PydanticCustomError("unknown_tool", message, {"type": each.type, "name": each.name})
        return choice


class ResponseRequest(PromptRequest, SampledRequest):
    """A request for a response."""

    background: bool = Field(
        False, description="Respond at once; the response continues, and can be read and streamed with GET"
    )
    include: list[Includable] = Field(
        [],
        max_length=16,
        description="`message.output_text.logprobs`: log-probabilities; `reasoning.encrypted_content`: the reasoning "
        "for requests that continue without `store`. Others have no effect: they are about tools that are refused, or "
        "are always included",
    )
    max_output_tokens: int | None = Field(
        None,
        ge=1,
        le=2**31 - 1,
        description="Maximum tokens to generate, with the reasoning. Default: the rest of the model's context",
    )
    max_tool_calls: Advice = None
    store: bool = Field(True, description="Store the response, so that it can be read and continued")
    stream_options: StreamOptions | None = Field(None, description="Allowed only with `stream`")
    top_logprobs: int | None = Field(
        None, ge=0, le=MAX_LOGPROBS, description="Return log-probabilities, with this many alternatives for each token"
    )
    enable_thinking: bool | None = Field(None, description="Whether the model reasons before it answers")
    thinking_budget: int | None = Field(None, ge=0, le=2**31 - 1, description="Maximum tokens of reasoning")
    chat_template_kwargs: TemplateVariables = Field({}, description="Variables for the model's chat template")
    user: str | None = Field(None, max_length=512, description="Returned; has no effect")
    safety_identifier: str | None = Field(None, max_length=512, description="Returned; has no effect")
    prompt_cache_key: str | None = Field(None, max_length=512, description="Returned; has no effect")
    prompt_cache_retention: Advice = None
    prompt_cache_options: Advice = None
    client_metadata: Advice = None
    image: Advice = None
    access_programs: Unsupported = None
    background_options: Unsupported = None
    context_management: Unsupported = None
    moderation: Unsupported = None
    prompt: Unsupported = None

    @field_validator("store")
    @classmethod
    def _background_is_stored(cls, store: bool, info: ValidationInfo) -> bool:
        if not store and info.data.get("background"):
            raise PydanticCustomError("not_stored", "A background response must be stored: leave out store")
        return store

    @property
    def logprobs(self) -> int | None:
        """Number of alternatives for each token; None without log-probabilities."""
        return self.top_logprobs or 0 if self.top_logprobs is not None or LOGPROBS in self.include else None


class TokensRequest(PromptRequest):
    """A prompt whose tokens are to be counted."""

    personality: Unsupported = None
