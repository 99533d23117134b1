"""Parses the tool calls in an answer with mlx-lm's tool parsers."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Self, TypeAlias

from shared.constraints.parts import takes_text
from shared.tokenizing import generic_tools

Parse: TypeAlias = Callable[[str, list[dict[str, Any]]], Any]
"""Returns the call or the list of calls in a section, each with `name` and `arguments`. May raise any exception."""

HARMONY: Final = "harmony"
"""The channels of gpt-oss, whose calls mlx-lm does not parse."""
_MINICPM5: Final = "minicpm5"
_MISTRAL: Final = "mistral"
_KIMI_K2: Final = "kimi_k2"
_VALUES: Final[dict[str, tuple[str, str]]] = {
    "glm47": ("<arg_value>", "</arg_value>"),
    "longcat": ("<longcat_arg_value>", "</longcat_arg_value>"),
    _MINICPM5: ("<param ", "</param>"),
    "minimax_m2": ("<parameter ", "</parameter>"),
    "muse_spark": ("<atem:parameter ", "</atem:parameter>"),
    "qwen3_coder": ("<parameter=", "</parameter>"),
}
"""By format: what encloses the value of an argument. An end marker inside a value belongs to the value."""
_NESTING: Final[dict[str, tuple[str, ...]]] = {
    "function_gemma": (r"(call:\w+\{)|\}",),
    "gemma4": (r"(\{)|\}", r"(call:)|\}"),
    "kimi_k3": tuple(rf"(<\|open\|>{name})|<\|close\|>{name}<\|sep\|>" for name in ("call", "argument", "json")),
    "muse_spark": tuple(rf"(<atem:{name})|</atem:{name}>" for name in ("invoke", "parameter")),
}
"""By format: what the parser's regular expressions search for with a cost that grows with the square of the number of
openings (the group) without an end."""
_MAX_NESTING: Final = 32
_SELF_CONTAINED: Final = frozenset({HARMONY, "json_tools", _MISTRAL})
"""Formats of which a cut call cannot be parsed. The parsers of the others would drop the cut argument."""
_TEXT_CALL: Final = re.compile(r'\s*\{"name": "([^"\\]+)"\}\n(.*?)\n?', re.DOTALL)
"""A call whose argument is a text of a grammar, in every format but gpt-oss's."""
_NAME: Final = re.compile(r"[\w.:/-]{1,128}")


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How a model writes tool calls.

    Attributes:
        name: the module of `mlx_lm.tool_parsers`, or `HARMONY`.
        start, end: markers around a section with calls; `end` is empty if the section extends to the answer's end.
        is_explained: whether the prompt explains it to the model (`shared.tokenizing.generic_tools`).
    """

    name: str
    start: str
    end: str
    parse: Parse
    is_explained: bool = False

    @classmethod
    def explained(cls) -> Self:
        """Return the format of models without one of their own."""
        return cls("json_tools", generic_tools.START, generic_tools.END, _parse_json, is_explained=True)

    @classmethod
    def of(cls, parse: Parse, start: str, end: str) -> Self:
        """Return the format of a function of `mlx_lm.tool_parsers`. Some modules use the function of another one."""
        return cls(parse.__module__.rpartition(".")[2], start, end, parse)

    @property
    def card_name(self) -> str:
        """The format's name in the model's card."""
        return generic_tools.FORMAT if self.is_explained else self.name

    @property
    def self_contained(self) -> bool:
        """Whether a section without its end marker can only be parsed if its calls are complete."""
        return self.name in _SELF_CONTAINED

    def is_inside_value(self, section: str) -> bool:
        """Whether a section stops inside an argument's value, so that an end marker at this place is text."""
        if self.name == "json_tools" or _is_json(section):
            return _ends_in_string(section)
        begin, end = _VALUES.get(self.name, ("", ""))
        return bool(begin) and section.count(begin) > section.count(end)


def _parse_json(section: str, _tools: list[dict[str, Any]]) -> Any:
    # The same as mlx-lm's parser. Importing mlx-lm here would load MLX into processes that do not need it.
    return json.loads(section)


def _is_json(section: str) -> bool:
    """Whether a section has a call in the form of constrained answers, which every format accepts."""
    return section.lstrip().startswith('{"name": ')


def _ends_in_string(text: str) -> bool:
    """Whether JSON text stops inside a string."""
    try:
        json.loads(text)
    except ValueError as error:
        return str(error).startswith("Unterminated string")
    except RecursionError:
        return False
    return False


class ToolCalls:
    """Turns the sections of one answer into tool calls in OpenAI's form.

    Args:
        tools: the request's tools. Some formats need the types of the parameters.
        seed: the job's id. Call ids depend on it and on the index only, so every attempt gives the same ids.
        parallel: whether the answer may have several calls.
    """

    def __init__(self, form: ToolFormat, tools: Sequence[Mapping[str, Any]], seed: str, *, parallel: bool) -> None:
        self.form = form
        self._tools = [_with_parameters(tool) for tool in tools]
        self._names = {tool["function"]["name"] for tool in self._tools}
        self._texts = {tool["function"]["name"] for tool in self._tools if takes_text(tool["function"])}
        self._seed = seed
        self._parallel = parallel
        self._count = 0

    @property
    def full(self) -> bool:
        """Whether the answer has all the calls that it may have."""
        return self._count > 0 and not self._parallel

    def parse(self, section: str, recipient: str = "") -> list[dict[str, Any]]:
        """Return the calls in a section; none if the section is malformed.

        Args:
            recipient: the function's name, for formats that write it in a message's header.
        """
        if self._too_nested(section) or (self.form.name == _MINICPM5 and self.form.end in section):
            return []  # the parser of minicpm5 would take the marker inside a value for the end
        if text_call := self._text_call(section, recipient):
            return [text_call]
        try:
            if self.form.name == HARMONY:
                parsed: Any = {"name": recipient, "arguments": json.loads(section)}
            else:
                parsed = json.loads(section) if _is_json(section) else self.form.parse(section, self._tools)
            found = [self._checked(call, section) for call in (parsed if isinstance(parsed, list) else [parsed])]
        except Exception:  # noqa: BLE001 - parsers raise exceptions of any type for malformed text
            return []
        return [self._call(*each) for each in (found if self._parallel else found[:1])]

    def _text_call(self, section: str, recipient: str) -> dict[str, Any] | None:
        """Return the call of a function whose argument is a text; None if the section has none."""
        name, text = recipient, section
        if self.form.name != HARMONY:
            match = _TEXT_CALL.fullmatch(section) if self._texts else None
            name, text = (match[1], match[2]) if match else ("", "")
        return self._call(name, _arguments_json({"input": text}), "") if name in self._texts else None

    def _too_nested(self, section: str) -> bool:
        """Whether the parser could take so long that the engine would stand still: 300 s for 100 KB were measured."""
        return any(_depth(pattern, section) > _MAX_NESTING for pattern in _NESTING.get(self.form.name, ()))

    def _checked(self, call: Any, section: str) -> tuple[str, str, str]:
        """Return the name, the arguments as JSON and the model's own id of a call.

        Raises:
            ValueError: the call is malformed.
        """
        name, arguments = call["name"], call.get("arguments")
        if isinstance(arguments, str):
            arguments = json.loads(arguments)
        if not isinstance(arguments, dict | None) or not _NAME.fullmatch(name):
            raise ValueError(name)
        if self.form.name == "glm47" and name not in self._names and "<arg_key>" not in section:
            raise ValueError(name)  # this parser takes the first word of any text for a function
        model_id = str(call.get("id") or "")
        return name, _arguments_json(arguments or {}), model_id if _NAME.fullmatch(model_id) else ""

    def _call(self, name: str, arguments: str, model_id: str) -> dict[str, Any]:
        index, self._count = self._count, self._count + 1
        digest = hashlib.blake2b(f"{self._seed}:{index}".encode(), digest_size=12).hexdigest()
        if self.form.name == _MISTRAL:  # its template accepts only ids of nine letters and digits
            call_id = digest[:9]
        elif self.form.name == _KIMI_K2 and model_id:  # its template shows the id to the model
            call_id = model_id
        else:
            call_id = f"call_{digest}"
        function = {"name": name, "arguments": arguments}
        return {"index": index, "id": call_id, "type": "function", "function": function}


def _depth(pattern: str, text: str) -> int:
    """Return how many openings at most are unfinished at the same time."""
    depth = deepest = 0
    for match in re.finditer(pattern, text):
        depth = depth + 1 if match[1] else max(0, depth - 1)
        deepest = max(deepest, depth)
    return deepest


def _with_parameters(tool: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tool with a schema of its parameters, which some parsers require."""
    function = tool["function"]
    return {**tool, "function": {**function, "parameters": function.get("parameters") or {}}}


def _arguments_json(arguments: dict[str, Any]) -> str:
    """Encode arguments. JSON has no NaN, and UTF-8 has no lone surrogates."""
    text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(arguments, allow_nan=False)
    return text
