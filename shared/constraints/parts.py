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
    return [*own, *_tool_parts(request)]


def is_strict(function: Mapping[str, Any]) -> bool:
    """Whether the arguments of a function must satisfy its schema or grammar whenever the model calls it."""
    return function.get("strict") is True or takes_text(function)


def takes_text(function: Mapping[str, Any]) -> bool:
    """Whether the model writes the argument of a function as text of a grammar, instead of writing JSON."""
    return bool(function.get("grammar"))


def refusal(field: str, reason: object) -> PromptRefused:
    """Return the error for a constraint that cannot be honoured."""
    return PromptRefused(JobFailure.CONSTRAINT, f"{field} cannot be honoured: {reason}", field)


def _tool_parts(request: Request) -> Iterator[Part]:
    """Yield the constraint of each tool whose arguments must satisfy it."""
    choice = request.tool_choice
    for index, tool in enumerate(request.tools or () if choice != "none" else ()):
        function = tool["function"]
        demanded = choice in ("required", f"function:{function['name']}")
        if not (demanded or (choice == "auto" and is_strict(function))):
            continue
        if takes_text(function):
            yield Part(f"tools[{index}].function.grammar", Constraint("grammar", function["grammar"]))
        elif "parameters" in function:
            schema = json.dumps({"type": "object", **function["parameters"]})
            yield Part(f"tools[{index}].function.parameters", Constraint("json_schema", schema))
