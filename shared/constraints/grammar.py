"""Compiles a request's constraint to an llguidance grammar, and checks it.

llguidance (https://github.com/guidance-ai/llguidance) computes which tokens may come next. It limits the size of a
grammar and the work per token itself. A constraint is checked in a helper process (`shared.tokenizing.helper`), because
a parser that recurses too deeply would end its process.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

from llguidance import LLMatcher, LLParserLimits

from shared.constraints import json_schema
from shared.jobs.request import Constraint

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions  # exists in the stubs only

MAX_CHARACTERS: Final = 256 * 2**10
"""Maximum length of a regular expression, a grammar, or all choices together."""

WHITESPACE: Final = r" |\n {0,16}"
"""White space between the tokens of JSON. It is bounded, otherwise a model may write white space until its limit."""
_JSON_OPTIONS: Final[JsonCompileOptions] = {
    "whitespace_flexible": True,
    "whitespace_pattern": WHITESPACE,
    "coerce_one_of": False,
    "lenient": False,
}
_MAX_MESSAGE: Final = 500
_PARTS: Final = {
    "json_object": "response_format",
    "json_schema": "response_format.json_schema.schema",
    "regex": "response_format.regex",
    "choice": "response_format.choice",
    "grammar": "response_format.grammar",
}


class ConstraintRefused(Exception):
    """A constraint cannot be honoured. `part` is the request field, such as `response_format.json_schema.schema`."""

    def __init__(self, part: str, reason: str) -> None:
        super().__init__(reason)
        self.part = part


def compile_constraint(constraint: Constraint) -> str:
    """Return a constraint's grammar in llguidance's format.

    Raises:
        ConstraintRefused: it is malformed. `check_grammar` finds the other problems.
    """
    part = _PARTS.get(constraint.kind)
    if part is None:
        raise ConstraintRefused("response_format.type", f"the type {constraint.kind!r} is not supported")
    if constraint.kind in ("json_object", "json_schema"):
        return compile_schema(constraint.source if constraint.kind == "json_schema" else '{"type":"object"}', part)
    if len(constraint.source) > MAX_CHARACTERS:
        raise ConstraintRefused(part, f"it can have at most {MAX_CHARACTERS:,} characters")
    match constraint.kind:
        case "regex":
            return str(LLMatcher.grammar_from_regex(constraint.source))
        case "choice":
            return str(LLMatcher.grammar_from_lark(_choice(constraint.source, part)))
        case _:
            return str(LLMatcher.grammar_from_lark(constraint.source))


def compile_schema(text: str, part: str) -> str:
    """Return the grammar of a JSON schema.

    Raises:
        ConstraintRefused: the schema is malformed or uses an unsupported keyword.
    """
    return str(LLMatcher.grammar_from_json_schema(json.dumps(checked_schema(text, part)), overrides=_JSON_OPTIONS))


def checked_schema(text: str, part: str) -> dict[str, Any]:
    """Parse and check a schema, see `shared.constraints.json_schema.parse`.

    Raises:
        ConstraintRefused: instead of `SchemaRefused`.
    """
    try:
        return json_schema.parse(text)
    except json_schema.SchemaRefused as error:
        place = f"{part}.{error.path}" if error.path else part
        raise ConstraintRefused(part, f"{place}: {error}" if error.path else str(error)) from error


def limits() -> LLParserLimits:
    """Return the limits of a grammar and of the work per token. Error messages omit the parser's state."""
    return LLParserLimits(verbose_errors=False)


def check_grammar(grammar: str, part: str) -> None:
    """Check a grammar without a tokenizer.

    Raises:
        ConstraintRefused: llguidance cannot honour it, or it is too large.
    """
    failed, messages = LLMatcher.validate_grammar_with_warnings(grammar, limits=limits())
    if failed:
        raise ConstraintRefused(part, short_message(messages[0]))


def check(constraint: Constraint) -> None:
    """Check a constraint completely.

    Raises:
        ConstraintRefused: it cannot be honoured.
    """
    check_grammar(compile_constraint(constraint), _PARTS.get(constraint.kind, "response_format"))


def short_message(message: str) -> str:
    """Return the first lines of llguidance's message, which may quote a whole grammar."""
    text = message.partition("<state>")[0].strip()
    return text if len(text) <= _MAX_MESSAGE else text[:_MAX_MESSAGE] + "…"


def _choice(source: str, part: str) -> str:
    """Return a Lark grammar of a JSON list of texts."""
    choices = json.loads(source)
    if not isinstance(choices, list) or not choices or not all(isinstance(each, str) and each for each in choices):
        raise ConstraintRefused(part, "it must be a list of at least one text, none of them empty")
    return "start: " + " | ".join(json.dumps(each, ensure_ascii=False) for each in choices)
