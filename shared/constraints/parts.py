"""The parts of a request that constrain its answer. Does not import llguidance, whose import takes 0.1 s."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple

from shared.errors import JobFailure, PromptRefused
from shared.jobs.request import Constraint, Request

_FIELDS: Final = {
    "json_schema": "response_format.json_schema.schema",
    "regex": "response_format.regex",
    "choice": "response_format.choice",
    "grammar": "response_format.grammar",
}


class Part(NamedTuple):
    """A constraint and the request field that has it, such as `tools[0].function.parameters`."""

    field: str
    constraint: Constraint


def constraint_field(constraint: Constraint) -> str:
    """Return the request field of a constraint."""
    return _FIELDS.get(constraint.kind, "response_format")


def parts(request: Request) -> list[Part]:
    """Return the constraints of a request: its own and those of the tools whose calls are constrained."""
    own = [] if request.constraint is None else [Part(constraint_field(request.constraint), request.constraint)]
    return [*own, *(Part(field, Constraint("json_schema", schema)) for field, schema in _tool_schemas(request))]


def constrained_tools(request: Request) -> list[Mapping[str, Any]]:
    """Return the functions that an answer must call, or whose arguments must satisfy their schema if it calls them."""
    return [function for _, function in _functions(request)]


def refusal(field: str, reason: object) -> PromptRefused:
    """Return the error for a constraint that cannot be honoured."""
    return PromptRefused(JobFailure.CONSTRAINT, f"{field} cannot be honoured: {reason}", field)


def _functions(request: Request) -> Iterator[tuple[int, Mapping[str, Any]]]:
    choice = request.tool_choice
    name = choice.removeprefix("function:") if choice.startswith("function:") else None
    for index, tool in enumerate(request.tools or () if choice != "none" else ()):
        function = tool["function"]
        if function["name"] == name or choice == "required" or (name is None and function.get("strict")):
            yield index, function


def _tool_schemas(request: Request) -> Iterator[tuple[str, str]]:
    for index, function in _functions(request):
        if (parameters := function.get("parameters")) is not None:
            yield f"tools[{index}].function.parameters", json.dumps(parameters)
