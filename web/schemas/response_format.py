"""The form that an answer must have."""

from __future__ import annotations

import json
from typing import Annotated, Any, Final, Literal

from pydantic import Discriminator, Field, StringConstraints, Tag

from shared.jobs.request import Constraint
from web.schemas.base import RequestModel

MAX_SOURCE_CHARACTERS: Final = 256 * 2**10
MAX_CHOICES: Final = 1000
_ADVICE: Final = "Accepted for compatibility; has no effect"
Source = Annotated[str, StringConstraints(min_length=1, max_length=MAX_SOURCE_CHARACTERS)]


class TextFormat(RequestModel):
    """Any text."""

    type: Literal["text"]

    def constraint(self) -> None:
        """Return no constraint."""


class JsonObjectFormat(RequestModel):
    """A JSON object."""

    type: Literal["json_object"]

    def constraint(self) -> Constraint:
        """Return the constraint as the job's record stores it."""
        return Constraint("json_object")


class JsonSchema(RequestModel):
    """A JSON schema, in OpenAI's format."""

    name: str | None = Field(None, min_length=1, max_length=128, description=_ADVICE)
    description: str | None = Field(None, description=_ADVICE)
    schema_: dict[str, Any] = Field(alias="schema", description="The JSON schema")
    strict: bool | None = Field(None, description="Accepted for compatibility; every schema is strict")


class JsonSchemaFormat(RequestModel):
    """JSON that satisfies a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema

    def constraint(self) -> Constraint:
        """Return the constraint as the job's record stores it."""
        return Constraint("json_schema", json.dumps(self.json_schema.schema_, ensure_ascii=False))


class RegexFormat(RequestModel):
    """Text that a regular expression matches as a whole."""

    type: Literal["regex"]
    regex: Source

    def constraint(self) -> Constraint:
        """Return the constraint as the job's record stores it."""
        return Constraint("regex", self.regex)


class ChoiceFormat(RequestModel):
    """One of several texts."""

    type: Literal["choice"]
    choice: list[Source] = Field(min_length=1, max_length=MAX_CHOICES)

    def constraint(self) -> Constraint:
        """Return the constraint as the job's record stores it."""
        return Constraint("choice", json.dumps(self.choice, ensure_ascii=False))


class GrammarFormat(RequestModel):
    """Text of a context-free grammar."""

    type: Literal["grammar"]
    grammar: Source = Field(description="A grammar in Lark's notation")

    def constraint(self) -> Constraint:
        """Return the constraint as the job's record stores it."""
        return Constraint("grammar", self.grammar)


def _tag(value: object) -> str:
    """Return the tag for a value's type. Brackets omit it from the path of an invalid field."""
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return f"({kind})"


ResponseFormat = Annotated[
    Annotated[TextFormat, Tag("(text)")]
    | Annotated[JsonObjectFormat, Tag("(json_object)")]
    | Annotated[JsonSchemaFormat, Tag("(json_schema)")]
    | Annotated[RegexFormat, Tag("(regex)")]
    | Annotated[ChoiceFormat, Tag("(choice)")]
    | Annotated[GrammarFormat, Tag("(grammar)")],
    Discriminator(
        _tag,
        custom_error_type="response_format",
        custom_error_message="type must be text, json_object, json_schema, regex, choice or grammar",
    ),
]
