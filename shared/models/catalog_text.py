"""The text of a catalog: its content, also when some entries are not TOML, and the line of each key.

tomllib has no positions for values, and neither has tomlkit. But each statement of a TOML file (a table's header, or a
key and its value) is valid TOML by itself, so parsing statement by statement gives the line of every key.
"""

from __future__ import annotations

import re
import tomllib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, Final

_NUMBER: Final = re.compile(r"\(at line (\d+), column \d+\)$")

_Path = tuple[str, ...]


class CatalogText:
    """A file of tables [models.NAME].

    Attributes:
        content: the parsed file, without the entries that are not TOML.
        faults: (line, what is wrong) of each such entry.
    """

    def __init__(self, text: str) -> None:
        self._lines = text.split("\n")
        self._first_lines: dict[_Path, int] = {}
        self.content: dict[str, Any] = {}
        self.faults: list[tuple[int, str]] = []
        entries = self._locate()
        try:
            self.content = tomllib.loads(text)
        except (tomllib.TOMLDecodeError, RecursionError):
            self._parse_each(entries)

    def line(self, *path: str) -> int:
        """The line of a key, or of the innermost table around it that the file has; 1 if it has none."""
        known = (self._first_lines.get(path[:end]) for end in range(len(path), 0, -1))
        return next((line for line in known if line), 1)

    def _locate(self) -> dict[_Path, list[int]]:
        """Find the line of each key; returns the lines of each entry, those of all its tables."""
        entries: dict[_Path, list[int]] = defaultdict(list)
        table: _Path = ()
        for lines, content in _statements(self._lines):
            paths = list(_paths(content))
            if self._lines[lines[0] - 1].lstrip().startswith("["):
                table, paths = max(paths, default=()), []
            for path in (table, *(table + path for path in paths)):
                for end in range(1, len(path) + 1):
                    self._first_lines.setdefault(path[:end], lines[0])
            entries[table[:2]].extend(lines)
        return entries

    def _parse_each(self, entries: dict[_Path, list[int]]) -> None:
        """Parse as many entries as are TOML together."""
        accepted: set[int] = set()
        for path, lines in entries.items():
            together = accepted.union(lines)
            # Other lines become empty, so that the numbers in messages are those of the file.
            texts = [text if number in together else "" for number, text in enumerate(self._lines, 1)]
            try:
                self.content, accepted = tomllib.loads("\n".join(texts)), together
            except (tomllib.TOMLDecodeError, RecursionError) as error:
                entry = f"[{'.'.join(path)}] is " if len(path) == 2 else ""
                said = str(error).partition(" (at ")[0]
                self.faults.append((self._blamed(str(error), lines), f"{entry}not TOML: {said}"))

    def _blamed(self, message: str, lines: Sequence[int]) -> int:
        """The line of an entry that a parser's message names; the last one with any text where it names none."""
        found = _NUMBER.search(message)
        texts = [line for line in lines if self._lines[line - 1].strip()]
        return max((line for line in texts if not found or line <= int(found[1])), default=texts[-1])


def _statements(lines: Sequence[str]) -> Iterator[tuple[range, dict[str, Any]]]:
    """Line numbers and content of each statement. A line that is not TOML is one, without content."""
    first = 1
    while first <= len(lines):
        last, content = _statement(lines, first)
        yield range(first, last + 1), content
        first = last + 1


def _statement(lines: Sequence[str], first: int) -> tuple[int, dict[str, Any]]:
    """Last line and content of the statement that begins on a line."""
    for last in range(first, len(lines) + 1):
        try:
            return last, tomllib.loads("\n".join(lines[first - 1 : last]))
        except tomllib.TOMLDecodeError as error:
            found = _NUMBER.search(str(error))
            if found and int(found[1]) <= last - first:
                break  # an earlier line is wrong, so more lines change nothing
        except RecursionError:
            break
    return first, {}


def _paths(content: Any) -> Iterator[_Path]:
    """The path of each key, outer ones first."""
    for key, value in content.items() if isinstance(content, dict) else ():
        yield (key,)
        yield from ((key, *rest) for rest in _paths(value))
