"""Checks JSON schemas before they constrain an answer.

llguidance refuses most keywords that it does not implement, but ignores unknown ones and accepts schemas that no finite
value satisfies. Both would give answers that violate the schema, so this module refuses them and names the place.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, Final

MAX_DEPTH: Final = 64
"""Maximum nesting of objects and arrays in a schema; llguidance's parsers are recursive."""
MAX_VALUES: Final = 20_000
"""Maximum number of subschemas and enum values. 20,000 values compile in about a second."""
_MAX_VISITS: Final = 100_000

_SUBSCHEMA: Final = frozenset({"items", "additionalProperties", "additionalItems"})
_SUBSCHEMAS: Final = frozenset({"anyOf", "oneOf", "allOf", "prefixItems"})
_NAMED_SUBSCHEMAS: Final = frozenset({"properties", "patternProperties", "$defs", "definitions"})
_ASSERTIONS: Final = frozenset(
    {
        *("type", "enum", "const", "$ref", "pattern", "format", "minLength", "maxLength", "multipleOf"),
        *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "minItems", "maxItems"),
        *("required", "minProperties", "maxProperties"),
    }
)
_ANNOTATIONS: Final = frozenset(
    {
        *("title", "description", "default", "example", "examples", "deprecated", "readOnly", "writeOnly", "$comment"),
        *("$schema", "$id", "id", "$anchor", "contentEncoding", "contentMediaType", "contentSchema", "discriminator"),
    }
)
"""Keywords that do not change which values are valid."""
_KNOWN: Final = _SUBSCHEMA | _SUBSCHEMAS | _NAMED_SUBSCHEMAS | _ASSERTIONS | _ANNOTATIONS


class SchemaRefused(Exception):
    """A schema cannot be honoured. `path` is the place in the schema, such as `properties.name`; empty for the root."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(reason)
        self.path = path


def parse(text: str) -> dict[str, Any]:
    """Parse and check a schema.

    Returns:
        The schema; `true` becomes an empty schema.

    Raises:
        SchemaRefused: it is no valid schema, too large, has an unsupported keyword, or no finite value satisfies it.
    """
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SchemaRefused("", "the schema is not valid JSON, or too deeply nested") from error
    if schema is True:
        return {}
    if not isinstance(schema, dict):
        raise SchemaRefused("", "the schema must be an object")
    _check_size(schema)
    for path, subschema in _subschemas(schema):
        _check_keywords(path, subschema)
    if not _Finite(schema).check(schema):
        raise SchemaRefused("", "no finite value satisfies the schema: its recursion never ends")
    return schema


def _check_size(schema: dict[str, Any]) -> None:
    count = 0
    level: list[Any] = [schema]
    for _ in range(MAX_DEPTH):
        children = [child for value in level for child in _children(value)]
        count += len(children)
        if count > MAX_VALUES:
            raise SchemaRefused("", f"a schema can have at most {MAX_VALUES:,} values")
        level = children
    if level:
        raise SchemaRefused("", f"a schema can be nested at most {MAX_DEPTH} levels deep")


def _children(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def _subschemas(schema: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield all subschemas with their paths."""
    yield path, schema
    if not isinstance(schema, dict):
        return
    for keyword, value in schema.items():
        place = f"{path}.{keyword}" if path else keyword
        if keyword in _NAMED_SUBSCHEMAS and isinstance(value, dict):
            for name, each in value.items():
                yield from _subschemas(each, f"{place}.{name}")
        elif (keyword in _SUBSCHEMAS or keyword == "items") and isinstance(value, list):
            for index, each in enumerate(value):
                yield from _subschemas(each, f"{place}[{index}]")
        elif keyword in _SUBSCHEMA:
            yield from _subschemas(value, place)


def _check_keywords(path: str, schema: Any) -> None:
    if isinstance(schema, bool):
        return
    if not isinstance(schema, dict):
        raise SchemaRefused(path, "a schema must be an object or a boolean")
    for keyword, value in schema.items():
        if keyword == "nullable" and value is False:
            continue
        if keyword not in _KNOWN:
            raise SchemaRefused(path, f"the keyword {keyword[:100]!r} is not supported")
        if keyword in _NAMED_SUBSCHEMAS and not isinstance(value, dict):
            raise SchemaRefused(path, f"{keyword!r} must be an object")
        if keyword in _SUBSCHEMAS and not isinstance(value, list):
            raise SchemaRefused(path, f"{keyword!r} must be an array")


class _Finite:
    """Finds out whether a finite value satisfies a schema. Gives up, and assumes so, after `_MAX_VISITS`."""

    def __init__(self, root: Mapping[str, Any]) -> None:
        self._root = root
        self._visits = 0
        self._pending: set[str] = set()  # references on the way to the current subschema
        self._finite: set[str] = set()

    def check(self, schema: Any) -> bool:
        """Return whether a finite value satisfies a subschema."""
        self._visits += 1
        if not isinstance(schema, dict) or self._visits > _MAX_VISITS or "enum" in schema or "const" in schema:
            return True
        alternatives = [schema[name] for name in ("anyOf", "oneOf") if isinstance(schema.get(name), list)]
        return (
            self._check_reference(schema.get("$ref"))
            and all(map(self.check, schema.get("allOf", ())))
            and all(any(map(self.check, each)) for each in alternatives)
            and (_allows_scalars(schema) or all(map(self.check, self._needed(schema))))
        )

    def _check_reference(self, reference: Any) -> bool:
        if not isinstance(reference, str) or reference in self._finite:
            return True
        if reference in self._pending:
            return False
        self._pending.add(reference)
        finite = self.check(self._resolved(reference))
        self._pending.discard(reference)
        if finite:
            self._finite.add(reference)
        return finite

    def _resolved(self, reference: str) -> Any:
        value: Any = self._root
        for name in reference.removeprefix("#").split("/")[1:]:
            value = value.get(name.replace("~1", "/").replace("~0", "~")) if isinstance(value, dict) else None
        return value if reference.startswith("#/") or reference == "#" else None

    @staticmethod
    def _needed(schema: Mapping[str, Any]) -> list[Any]:
        """Return the subschemas of members and elements that every object or array must have."""
        properties, required = schema.get("properties", {}), schema.get("required", [])
        needed = [properties[name] for name in required if name in properties] if isinstance(required, list) else []
        least = schema.get("minItems", 0)
        if isinstance(least, int) and least > 0:
            first = schema.get("prefixItems", [])[:least]
            needed += first
            needed += [schema.get("items")] if least > len(first) else []
        return needed


def _allows_scalars(schema: Mapping[str, Any]) -> bool:
    """Return whether a value other than an object or an array satisfies the schema's type."""
    types = schema.get("type")
    if types is None:
        return not {"properties", "required", "items", "prefixItems"} & set(schema)
    return bool(set(types if isinstance(types, list) else [types]) - {"object", "array"})
