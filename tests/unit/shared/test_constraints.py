"""Constraints that cannot be honoured are refused, and the message names the place."""

from __future__ import annotations

import json
from typing import Any

import pytest

from shared.constraints import json_schema
from shared.constraints.grammar import MAX_CHARACTERS, ConstraintRefused, check
from shared.constraints.parts import parts
from shared.jobs.request import Constraint, Request, Sampling

NODE = {
    "type": "object",
    "properties": {"next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
    "required": ["next"],
    "additionalProperties": False,
}
ENDLESS = NODE | {"properties": {"next": {"$ref": "#/$defs/node"}}}


def schema(value: Any) -> Constraint:
    return Constraint("json_schema", json.dumps(value))


def nested(depth: int) -> dict[str, Any]:
    inner: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        inner = {"type": "array", "items": inner}
    return inner


@pytest.mark.parametrize(
    "constraint",
    [
        Constraint("json_object"),
        Constraint("regex", r"\d{4}-[a-z]+"),
        Constraint("choice", json.dumps(["yes", 'a "quoted" one', "línea\n"])),
        Constraint("grammar", "start: WORD+\nWORD: /[a-z]+ /"),
        schema(True),
        schema({}),
        schema({"type": ["string", "null"], "description": "d", "default": "x", "nullable": False}),
        schema({"$ref": "#/$defs/node", "$defs": {"node": NODE}}),
        schema({"type": "object", "properties": {"nullable": {"type": "integer"}, "not": {"const": 1}}}),
        schema({"type": "array", "prefixItems": [{"type": "string"}], "items": False, "minItems": 1}),
        schema({"type": "array", "items": {"$ref": "#"}}),
        schema({"allOf": [{"type": "object", "properties": {"a": {"type": "string"}}}, {"required": ["a"]}]}),
        schema({"type": "string", "pattern": "^a+$", "maxLength": 4}),
        schema({"$defs": {"a~b/c": {"type": "string"}}, "$ref": "#/$defs/a~0b~1c"}),
        schema({"type": "object", "patternProperties": {"^x": {"type": "integer"}}, "additionalProperties": False}),
    ],
    ids=lambda constraint: constraint.source[:40],
)
def test_constraints_that_can_be_honoured(constraint: Constraint) -> None:
    check(constraint)


@pytest.mark.parametrize(
    ("keyword", "value"),
    [
        ("uniqueItems", True),
        ("contains", {"type": "integer"}),
        ("not", {"type": "string"}),
        ("if", {"type": "string"}),
        ("dependentRequired", {"a": ["b"]}),
        ("propertyNames", {"pattern": "^a"}),
        ("unevaluatedProperties", False),
        ("$dynamicRef", "#a"),
        ("nullable", True),
        ("x-guidance", {"lenient": True}),
        ("minlength", 3),
    ],
)
def test_an_unsupported_keyword_is_named(keyword: str, value: object) -> None:
    inner = {"type": "array", "items": {keyword: value}}
    with pytest.raises(ConstraintRefused, match="not supported") as refused:
        check(schema({"type": "object", "properties": {"list": inner}}))
    assert f"at properties.list.items: the keyword {keyword!r}" in str(refused.value)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ('{"type": "strin', "not valid JSON"),
        ("[1]", "must be an object"),
        ('{"properties": [1]}', "must be an object"),
        ('{"anyOf": {}}', "must be an array"),
        ('{"items": 3}', "must be an object or a boolean"),
        ('{"type": "text"}', "Invalid type"),
        ('{"$ref": "#/$defs/none"}', "does not exist"),
        ('{"$ref": "https://example.com/schema"}', "does not fetch"),
        ('{"type": "string", "format": "colour"}', "Unknown format"),
        ('{"type": "string", "pattern": "(?=a)b"}', "look-around"),
        ('{"type": "integer", "minimum": 5, "maximum": 4}', "Unsatisfiable"),
        ('{"enum": []}', "Unsatisfiable"),
        ('{"oneOf": [{"type": "number"}, {"type": "integer"}]}', "oneOf"),
        (json.dumps({"$ref": "#/$defs/node", "$defs": {"node": ENDLESS}}), "no finite value"),
        ('{"type": "array", "items": {"$ref": "#"}, "minItems": 1}', "no finite value"),
        (json.dumps(nested(json_schema.MAX_DEPTH)), "nested at most"),
        ("[" * 100_000, "too deeply nested"),
        (json.dumps({"enum": list(range(json_schema.MAX_VALUES + 1))}), "at most"),
        (json.dumps({"description": "x" * MAX_CHARACTERS}), "at most"),
        ('{"type": "integer", "multipleOf": 982451653}', "fuel exhausted"),
    ],
    ids=lambda text: text[:30],
)
def test_schemas_that_cannot_be_honoured_are_refused(source: str, reason: str) -> None:
    with pytest.raises(ConstraintRefused, match=reason) as refused:
        check(Constraint("json_schema", source))
    assert len(str(refused.value)) < 1000


@pytest.mark.parametrize(
    "constraint",
    [
        Constraint("regex", "(?=a)b"),
        Constraint("regex", "(a"),
        Constraint("regex", "a" * (MAX_CHARACTERS + 1)),
        Constraint("choice", "[]"),
        Constraint("choice", '["a", ""]'),
        Constraint("grammar", "start: nothing"),
        Constraint("grammar", "begin: /a/"),
        Constraint("xml"),
    ],
    ids=lambda constraint: constraint.source[:20],
)
def test_other_constraints_that_cannot_be_honoured_are_refused(constraint: Constraint) -> None:
    with pytest.raises(ConstraintRefused):
        check(constraint)


TOOLS = tuple(
    {"type": "function", "function": {"name": name, "parameters": {"type": "object"}, "strict": strict}}
    for name, strict in (("one", True), ("two", False))
)


@pytest.mark.parametrize(
    ("choice", "constrained"), [("auto", [0]), ("none", []), ("required", [0, 1]), ("function:two", [1])]
)
def test_constrained_parts_of_a_request(choice: str, constrained: list[int]) -> None:
    request = Request("m", 1, Sampling(0.0), constraint=Constraint("regex", "a"), tools=TOOLS, tool_choice=choice)
    fields = [f"tools[{index}].function.parameters" for index in constrained]
    assert [part.field for part in parts(request)] == ["response_format.regex", *fields]
