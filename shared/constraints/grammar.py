"""Compiles a request's constraint to an llguidance grammar, and checks it.

llguidance (https://github.com/guidance-ai/llguidance) computes which tokens may come next. It limits the size of a
grammar and the work per token itself. A constraint is checked in a helper process (`shared.tokenizing.helper`), because
a parser that recurses too deeply would end its process.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper, regex_to_lark

from shared.constraints import json_schema
from shared.jobs.request import Constraint

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions  # exists in the stubs only

MAX_CHARACTERS: Final = 512 * 2**10
"""Maximum length of a schema, regular expression or grammar, or of all choices together."""
MAX_ITEMS: Final = 20_000
"""Maximum states of the parser after a token: four per property of an object. Computing these takes about 1 ms."""

WHITESPACE: Final = r" |\n {0,16}"
"""White space between the tokens of JSON. It is bounded, otherwise a model may write white space until its limit."""
_JSON_OPTIONS: Final[JsonCompileOptions] = {
    "whitespace_flexible": True,
    "whitespace_pattern": WHITESPACE,
    "coerce_one_of": False,
    "lenient": False,
}
_MAX_MESSAGE: Final = 500
_JSON_OBJECT: Final = '{"type": "object"}'


class ConstraintRefused(Exception):
    """A constraint cannot be honoured. The text says why, and names the place in a schema."""


def compile_constraint(constraint: Constraint) -> str:
    """Return a constraint's grammar in llguidance's format.

    Raises:
        ConstraintRefused: it is malformed. `check` finds the other problems.
    """
    source = constraint.source
    if len(source) > MAX_CHARACTERS:
        raise ConstraintRefused(f"it can have at most {MAX_CHARACTERS:,} characters")
    match constraint.kind:
        case "json_object":
            return compile_schema(_JSON_OBJECT)
        case "json_schema":
            return compile_schema(source)
        case "regex":
            return _lark_grammar(f"start: /{regex_to_lark(source, use_ascii='')}/")
        case "choice":
            return _lark_grammar(_choice(source))
        case "grammar":
            return _lark_grammar(source)
        case kind:
            raise ConstraintRefused(f"the type {kind!r} is not supported")


def limits() -> LLParserLimits:
    """Return the limits of a grammar and of the work per token. Error messages omit the parser's state."""
    return LLParserLimits(max_items_in_row=MAX_ITEMS, verbose_errors=False)


def check(constraint: Constraint) -> None:
    """Check a constraint with a tokenizer of single bytes: that of the model is not needed to find its problems.

    Raises:
        ConstraintRefused: it cannot be honoured.
    """
    matcher = LLMatcher(_byte_tokenizer(), compile_constraint(constraint), limits=limits(), log_level=0)
    check_matcher(matcher)


def check_matcher(matcher: LLMatcher) -> None:
    """Check a grammar that was just compiled, and that there is a first token.

    Raises:
        ConstraintRefused: it cannot be honoured.
    """
    if not matcher.is_error():
        matcher.compute_bitmask()
    if matcher.is_error():
        raise ConstraintRefused(short_message(matcher.get_error()))


def short_message(message: str) -> str:
    """Return the first lines of llguidance's message, which may quote a whole grammar."""
    text = message.partition("<state>")[0].strip()
    return text if len(text) <= _MAX_MESSAGE else text[:_MAX_MESSAGE] + "…"


def compile_schema(text: str) -> str:
    """Return the grammar of a JSON schema.

    Raises:
        ConstraintRefused: it is malformed, see `shared.constraints.json_schema.parse`.
    """
    try:
        schema = json_schema.parse(text)
    except json_schema.SchemaRefused as error:
        raise ConstraintRefused(f"at {error.path}: {error}" if error.path else str(error)) from error
    return str(LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=_JSON_OPTIONS))


def _lark_grammar(lark: str) -> str:
    return json.dumps({"grammars": [{"lark_grammar": lark}]})


def _choice(source: str) -> str:
    """Return a Lark grammar of a JSON list of texts."""
    choices = json.loads(source)
    if not isinstance(choices, list) or not choices or not all(isinstance(each, str) and each for each in choices):
        raise ConstraintRefused("it must be a list of at least one text, none of them empty")
    return "start: " + " | ".join(json.dumps(each, ensure_ascii=False) for each in choices)


class _Bytes:
    """A tokenizer whose tokens are the 256 bytes and an end-of-sequence token."""

    eos_token_id = 256
    bos_token_id = None
    tokens: Sequence[bytes] = (*(bytes([value]) for value in range(256)), b"<eos>")
    special_token_ids = (256,)

    def __call__(self, text: bytes | str) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


@lru_cache(maxsize=1)
def _byte_tokenizer() -> LLTokenizer:
    return LLTokenizer(TokenizerWrapper(_Bytes()))
