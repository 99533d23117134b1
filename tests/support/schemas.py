"""JSON schemas of every kind that constrained answers support."""

from __future__ import annotations

from typing import Any, Final


def _object(required: dict[str, Any], optional: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    properties = {**required, **(optional or {})}
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
        **more,
    }


def _array(items: Any, most: int = 4, **more: Any) -> dict[str, Any]:
    return {"type": "array", "items": items, "maxItems": most, **more}


STRING: Final = {"type": "string"}
SHORT: Final = {"type": "string", "maxLength": 20}
INTEGER: Final = {"type": "integer"}
NUMBER: Final = {"type": "number", "minimum": 0, "maximum": 1000}
BOOLEAN: Final = {"type": "boolean"}
COLOUR: Final = {"enum": ["red", "green", "blue"]}
_NODE: Final = _object({"value": INTEGER, "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}})
_TREE: Final = _object({"name": SHORT, "children": _array({"$ref": "#/$defs/tree"}, 2)})
_ADDRESS: Final = _object({"street": SHORT, "city": SHORT, "zip": {"type": "string", "pattern": "^[0-9]{5}$"}})

SCHEMAS: Final[dict[str, Any]] = {
    # values
    "string": STRING,
    "short string": SHORT,
    "long enough string": {"type": "string", "minLength": 5, "maxLength": 40},
    "integer": {"type": "integer", "minimum": -100_000, "maximum": 100_000},
    "integer in a range": {"type": "integer", "minimum": 5, "maximum": 17},
    "integer in an open range": {"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 100},
    "negative integer": {"type": "integer", "minimum": -20, "maximum": -3},
    "multiple": {"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 500},
    "number in a range": {"type": "number", "minimum": 0.5, "maximum": 2.5},
    "number in steps": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1, "multipleOf": 0.125},
    "boolean": BOOLEAN,
    "null": {"type": "null"},
    "string or null": {"type": ["string", "null"], "maxLength": 20},
    "const": {"const": "always"},
    "const object": {"const": {"a": [1, None, "x"]}},
    # enums
    "enum": COLOUR,
    "enum of several types": {"enum": [1, "one", None, True, {"a": 1}, [1, 2]]},
    "enum of unicode": {"enum": ["東京", "Zürich", "ελλάδα", "🙂", 'a"b\\c', "tab\there"]},
    "large enum": {"enum": [f"item {number}" for number in range(500)]},
    "enum limited by type": {"enum": [1, "one", 2, "two"], "type": "string"},
    # patterns and formats
    "pattern": {"type": "string", "pattern": "^[A-Z]{3}-[0-9]{2,4}$"},
    "alternatives in a pattern": {"type": "string", "pattern": "^(cat|dog|bird)s?$"},
    "unanchored pattern": {"type": "string", "pattern": "[0-9]", "maxLength": 12},
    "pattern of unicode": {"type": "string", "pattern": "^[äöü]{2,5}$"},
    "pattern and length": {"type": "string", "pattern": "^[a-z]+$", "minLength": 3, "maxLength": 8},
    "date": {"type": "string", "format": "date"},
    "time": {"type": "string", "format": "time", "maxLength": 20},
    "uuid": {"type": "string", "format": "uuid"},
    "ipv4": {"type": "string", "format": "ipv4"},
    "email": {"type": "string", "format": "email", "maxLength": 40},
    # arrays
    "array of integers": _array({"type": "integer", "minimum": 0, "maximum": 99}, 6),
    "array of exact length": _array(BOOLEAN, 3, minItems=3),
    "array of strings": _array(SHORT),
    "array of enums": _array(COLOUR, 5, minItems=2),
    "array of arrays": _array(_array({"type": "integer", "minimum": 0, "maximum": 9}, 3), 3),
    "tuple": {"type": "array", "prefixItems": [SHORT, BOOLEAN], "items": False, "minItems": 2},
    "tuple with more": {"type": "array", "prefixItems": [COLOUR], "items": BOOLEAN, "minItems": 1, "maxItems": 4},
    "empty array": {"type": "array", "maxItems": 0},
    "array of objects": _array(_object({"name": SHORT, "age": {"type": "integer", "minimum": 0, "maximum": 120}}), 3),
    "array of unions": _array({"anyOf": [BOOLEAN, COLOUR, {"type": "null"}]}, 5, minItems=1),
    # objects
    "person": _object({"name": STRING, "age": {"type": "integer", "minimum": 0, "maximum": 120}}),
    "optional properties": _object({"a": COLOUR}, {"b": BOOLEAN, "c": {"type": "null"}}),
    "only optional properties": _object({}, {"a": BOOLEAN, "b": BOOLEAN}),
    "at least one property": _object({}, {"a": BOOLEAN, "b": BOOLEAN}, minProperties=1),
    "no property": _object({}),
    "unicode names": _object({"größe": NUMBER, "色": COLOUR, 'quote"d': BOOLEAN}),
    "nested": _object({"a": _object({"b": _object({"c": _object({"d": COLOUR})})})}),
    "address": _object({"name": SHORT, "home": _ADDRESS}),
    "typed map": {"type": "object", "additionalProperties": BOOLEAN, "maxProperties": 2, "minProperties": 2},
    "pattern of names": {
        "type": "object",
        "patternProperties": {"^n_[a-c]$": {"type": "integer", "minimum": 0, "maximum": 9}},
        "additionalProperties": False,
        "minProperties": 1,
        "maxProperties": 3,
    },
    "many properties": _object({f"field_{number}": BOOLEAN for number in range(20)}),
    "described": _object(
        {"sentiment": {"enum": ["good", "bad"], "description": "the mood", "default": "good", "title": "Sentiment"}}
    ),
    # unions and combinations
    "union": {"anyOf": [{"type": "integer", "minimum": 0, "maximum": 99}, COLOUR]},
    "union of objects": {
        "anyOf": [_object({"kind": {"const": "circle"}, "radius": NUMBER}), _object({"kind": {"const": "dot"}})]
    },
    "tagged union": {
        "oneOf": [_object({"kind": {"const": "cat"}, "lives": INTEGER}), _object({"kind": {"const": "dog"}})],
        "discriminator": {"propertyName": "kind"},
    },
    "one of disjoint types": {"oneOf": [SHORT, BOOLEAN]},
    "all of": {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 9}]},
    "all of objects": {
        "allOf": [
            {"type": "object", "properties": {"a": COLOUR}, "required": ["a"]},
            {"type": "object", "properties": {"b": BOOLEAN}, "required": ["b"]},
        ],
        "additionalProperties": False,
        "properties": {"a": True, "b": True},
    },
    "optional value": _object({"value": {"anyOf": [COLOUR, {"type": "null"}]}}),
    # references and recursion
    "reference": {"$ref": "#/$defs/colour", "$defs": {"colour": COLOUR}},
    "two references": _object(
        {"from": {"$ref": "#/$defs/place"}, "to": {"$ref": "#/$defs/place"}},
        **{"$defs": {"place": _object({"name": SHORT})}},
    ),
    "references to references": {
        "$ref": "#/$defs/a",
        "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/c"}, "c": BOOLEAN},
    },
    "definitions": {"$ref": "#/definitions/flag", "definitions": {"flag": _object({"on": BOOLEAN})}},
    "reference with siblings": {"$ref": "#/$defs/text", "maxLength": 10, "$defs": {"text": STRING}},
    "linked list": {"$ref": "#/$defs/node", "$defs": {"node": _NODE}},
    "tree": {"$ref": "#/$defs/tree", "$defs": {"tree": _TREE}},
    "reference to the root": _object({"done": BOOLEAN}, {"inner": {"$ref": "#"}}),
    # as from an application
    "invoice": _object(
        {
            "number": {"type": "string", "pattern": "^INV-[0-9]{4}$"},
            "currency": {"enum": ["EUR", "USD"]},
            "lines": _array(_object({"text": SHORT, "price": NUMBER}), 2, minItems=1),
            "paid": BOOLEAN,
        }
    ),
    "calendar event": _object(
        {"title": SHORT, "date": {"type": "string", "format": "date"}, "guests": _array(SHORT, 3)},
        {"place": {"anyOf": [SHORT, {"type": "null"}]}},
    ),
    "steps": _object({"steps": _array(_object({"explanation": SHORT, "output": SHORT}), 2), "answer": SHORT}),
}
