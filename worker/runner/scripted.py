"""A runner for tests that answers from a script, with the same reasoning and tool formats as real models.

SCRIPT_FILE has one JSON object per line. Optionally the first one describes the model:

    {"reasoning": true, "tool_format": "json_tools", "structured": false}

These are the defaults. `tool_format` is a module of `mlx_lm.tool_parsers`, `harmony` for the channels of gpt-oss, or
null. Reasoning is marked by `<think>` and `</think>`. If `structured` is true, constraints are accepted and ignored.

Every other line is an answer. The first one that matches is given:

    {"match": "a regular expression", "in": "last", "text": "…"}

`match` is searched in the text of the last message or the prompt; with `"in": "any"` in the texts of all messages, one
per line. The texts of tool results and of the arguments of tool calls count as well. Without `match`, a line matches
every request. `"tokens": ["…", …]` instead of `text` gives the text already cut into tokens. `"directives":
"!every=0.02"` adds directives of the fake runner, which may also be in the prompt.

The same request always gets the same answer, so another worker continues an interrupted one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Final

from shared.jobs.request import Request
from shared.models.catalog import CatalogModel
from shared.models.folder import ModelError
from shared.settings import Settings
from worker.output.format import MessageFormat, channel_format, think_edges, tool_format_named
from worker.output.tool_calls import HARMONY
from worker.runner.base import Row
from worker.runner.fake import EOS, FakeDetokenizer, FakeRow, FakeRunner

_FIRST_PIECE: Final = 100_000
"""Ids from here on are pieces of the script's texts, in the order of the script."""
_PIECES: Final = re.compile(r"<[^<>\s]*>|\s*\w+|\s*[^\w\s<]|<|\s+")
_NO_ANSWER: Final = "The script has no answer for this request."


@dataclass(frozen=True, slots=True)
class _Line:
    """An answer of the script."""

    match: re.Pattern[str]
    anywhere: bool
    pieces: tuple[str, ...]
    directives: str

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> _Line:
        pieces = fields["tokens"] if "tokens" in fields else _PIECES.findall(fields["text"])
        anywhere = fields.get("in", "last") == "any"
        pattern = re.compile(fields.get("match", ""), re.DOTALL)
        return cls(pattern, anywhere, tuple(pieces), fields.get("directives", ""))

    def answers(self, texts: Sequence[str]) -> bool:
        return self.match.search("\n".join(texts) if self.anywhere else texts[-1]) is not None


class Script:
    """The answers of a script, and the model that it describes."""

    def __init__(self, lines: Sequence[Mapping[str, Any]]) -> None:
        has_model = bool(lines) and lines[0].keys().isdisjoint({"match", "text", "tokens"})
        self.model: Mapping[str, Any] = lines[0] if has_model else {}
        self._lines = [_Line.of(fields) for fields in lines[has_model:]]
        pieces = dict.fromkeys(chain(*(line.pieces for line in self._lines), _PIECES.findall(_NO_ANSWER)))
        self.ids = {piece: _FIRST_PIECE + index for index, piece in enumerate(pieces)}
        self.texts = {uid: piece for piece, uid in self.ids.items()}

    @classmethod
    def read(cls, path: Path) -> Script:
        """Read a file.

        Raises:
            OSError: it cannot be read.
            ValueError: a line is not valid.
        """
        return cls([json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()])

    def answer(self, request: Request) -> tuple[list[int], str]:
        """Return the tokens of the answer to a request, and the directives for it."""
        texts = _texts(request)
        for line in self._lines:
            if line.answers(texts):
                return [self.ids[piece] for piece in line.pieces], line.directives
        return [self.ids[piece] for piece in _PIECES.findall(_NO_ANSWER)], ""

    def message_format(self) -> MessageFormat:
        """Return the format that the script declares."""
        name = self.model.get("tool_format", "json_tools")
        if name == HARMONY:
            return channel_format()
        edges = think_edges("<think>", "</think>") if self.model.get("reasoning", True) else {}
        return MessageFormat(edges=edges, tool=tool_format_named(name) if name else None)


def _texts(request: Request) -> list[str]:
    """Return the texts of all messages; the prompt is one."""
    if request.messages is None:
        return [request.prompt or ""]
    return [_text(message) for message in request.messages] or [""]


def _text(message: Mapping[str, Any]) -> str:
    content = message.get("content") or ""
    parts = [content] if isinstance(content, str) else [part.get("text", "") for part in content]
    calls = [call["function"] for call in message.get("tool_calls") or ()]
    return "\n".join([*parts, *(f"{call['name']} {call['arguments']}" for call in calls)])


class ScriptedDetokenizer(FakeDetokenizer):
    """Decodes pieces of the script, and the tokens of the fake runner."""

    def __init__(self, texts: Mapping[int, str]) -> None:
        super().__init__()
        self._texts = texts

    def add(self, token: int) -> str:
        """See `Detokenizer.add`."""
        return self._texts[token] if token in self._texts else super().add(token)


class ScriptedRow(FakeRow):
    """A row that gives an answer of the script."""

    answer: Sequence[int] = ()

    def next(self) -> int:
        """Return the next token of the answer."""
        position, self.position = self.position, self.position + 1
        return self.answer[position] if position < len(self.answer) else EOS


class ScriptedRunner(FakeRunner):
    """See `worker.runner.base.ModelRunner`.

    Args:
        script: the answers.
        options: see `FakeRunner`.
    """

    def __init__(self, script: Script, **options: Any) -> None:
        super().__init__(**options)
        self._script = script
        self.message_format = script.message_format()
        form = self.message_format
        self.card = replace(
            self.card,
            reasoning=bool(script.model.get("reasoning", True)),
            tool_format=form.tool.name if form.tool else None,
            structured=bool(script.model.get("structured", False)),
        )

    def tokenize(self, request: Request) -> list[int]:
        """Return the bytes of the directives and of the texts of all messages."""
        _, directives = self._script.answer(request)
        return list("\n".join([directives, *_texts(request)]).encode())

    def detokenizer(self) -> ScriptedDetokenizer:
        """See `ModelRunner.detokenizer`."""
        return ScriptedDetokenizer(self._script.texts)

    def make_row(self, row: Row) -> FakeRow:
        """Return a row that gives the script's answer to its request."""
        scripted = ScriptedRow.of(row)
        scripted.answer, _ = self._script.answer(row.request)
        return scripted


def load(settings: Settings, model: CatalogModel) -> Generator[float, None, ScriptedRunner]:
    """Return a scripted runner with the id of a catalog model.

    Raises:
        ModelError: the script cannot be used.
    """
    yield from ()
    if settings.script_file is None:
        raise ModelError("BACKEND=scripted needs SCRIPT_FILE.")
    try:
        return ScriptedRunner(Script.read(settings.script_file), model=model.id, context=2**20)
    except (OSError, ImportError, ValueError, LookupError, TypeError, AttributeError, re.error) as error:
        raise ModelError(f"SCRIPT_FILE {settings.script_file} cannot be used: {error}") from error
