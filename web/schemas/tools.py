"""Tools that a model may call, and their calls, in OpenAI's format."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, Discriminator, Field, StringConstraints, Tag
from pydantic_core import PydanticCustomError

from web.schemas.base import RequestModel
from web.schemas.response_format import Source

MAX_TOOLS: Final = 128
MAX_TOOLS_BYTES: Final = 512 * 2**10
"""Maximum size of all tools as JSON. Templates write all of them into the prompt."""

ToolName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,128}$")]
"""A name must not contain characters with a meaning in a tool call's format."""


class FunctionDefinition(RequestModel):
    """A function that the model may call."""

    name: ToolName = Field(description="Letters, digits, `_` and `-`; different for each tool")
    description: str | None = Field(None, description="When and how to use the function")
    parameters: dict[str, Any] | None = Field(
        None, description="JSON schema of the arguments. Default: the function takes none"
    )
    strict: bool | None = Field(None, description="Generate only arguments that satisfy `parameters`")
    grammar: Source | None = Field(
        None,
        description="A grammar in Lark's notation. The function then has one argument, the text `input`, which the "
        "model writes as it is and not as JSON. It always satisfies the grammar",
    )


class Tool(RequestModel):
    """A tool. Only functions are supported."""

    type: Literal["function"]
    function: FunctionDefinition

    def to_record(self) -> dict[str, Any]:
        """Return the tool as the job's record stores it and as chat templates receive it."""
        return {"type": self.type, "function": self.function.model_dump(exclude_none=True)}


def _check_tools(tools: list[Tool]) -> list[Tool]:
    names = set[str]()
    for index, tool in enumerate(tools):
        if (name := tool.function.name) in names:
            message = "tools[{index}] has the same name as an earlier tool: {name}"
            raise PydanticCustomError("duplicate_tool", message, {"index": index, "name": name})
        names.add(name)
    if len(json.dumps([tool.to_record() for tool in tools]).encode()) > MAX_TOOLS_BYTES:
        message = "All tools together can have at most {limit} bytes as JSON"
        raise PydanticCustomError("tools_too_long", message, {"limit": MAX_TOOLS_BYTES})
    return tools


Tools = Annotated[list[Tool], Field(min_length=1, max_length=MAX_TOOLS, fail_fast=True), AfterValidator(_check_tools)]


class NamedFunction(RequestModel):
    """The name of a tool."""

    name: ToolName


class NamedTool(RequestModel):
    """A choice of one tool, which the model must call."""

    type: Literal["function"]
    function: NamedFunction


def _choice_tag(choice: object) -> str:
    return "(word)" if isinstance(choice, str) else "(tool)"


# The tags are in brackets so that `web.http.problems` can omit them from the path of an invalid field.
ToolChoice = Annotated[
    Annotated[Literal["auto", "none", "required"], Tag("(word)")] | Annotated[NamedTool, Tag("(tool)")],
    Discriminator(_choice_tag),
]


def check_choice(choice: ToolChoice, tools: Sequence[Tool] | None) -> None:
    """Raise an error if the tool choice demands a tool that the request does not have."""
    if choice in ("auto", "none"):
        return
    if not tools:
        raise PydanticCustomError("no_tools", "tool_choice demands a tool call, but the request has no tools")
    if isinstance(choice, NamedTool) and choice.function.name not in {tool.function.name for tool in tools}:
        message = "No tool in tools has the name {name}"
        raise PydanticCustomError("unknown_tool", message, {"name": choice.function.name})


def choice_record(choice: ToolChoice) -> str:
    """Return the tool choice as the job's record stores it."""
    return f"function:{choice.function.name}" if isinstance(choice, NamedTool) else choice


def _check_arguments(text: str) -> str:
    try:
        arguments = json.loads(text or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise PydanticCustomError("arguments", "The arguments must be a JSON object as text")
    return text or "{}"


class CalledFunction(RequestModel):
    """The function of a tool call, and its arguments."""

    name: ToolName
    arguments: Annotated[str, AfterValidator(_check_arguments)] = Field(
        description="The arguments, a JSON object as text"
    )


class ToolCall(RequestModel):
    """A tool call of an earlier answer."""

    id: str = Field(min_length=1, max_length=256, description="The `tool_call_id` of the message with the result")
    type: Literal["function"] = "function"
    function: CalledFunction
