"""Parses the text of a catalog, even if some entries are not valid TOML, and finds the line of each key.

Neither tomllib nor tomlkit reports the positions of values. But each statement of a TOML file (the header of a table,
or a key with its value) is valid TOML by itself, so parsing statement by statement gives the line of each key.
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
        content: the parsed file, without the entries that are not valid TOML.
        faults: (line, description) of each of these entries.
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
        """Return the line of a key; if the file lacks it, that of the innermost table around it, or 1."""
        known = (self._first_lines.get(path[:end]) for end in range(len(path), 0, -1))
        return next((line for line in known if line), 1)

    def _locate(self) -> dict[_Path, list[int]]:
        """Find the line of each key. Returns the lines of each entry, including all its tables."""
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
        """Parse entry by entry, and record those that are not valid TOML."""
        accepted: set[int] = set()
        for path, lines in entries.items():
            together = accepted.union(lines)
            # Other lines are replaced by empty ones, which keeps line numbers in error messages correct.
            texts = [text if number in together else "" for number, text in enumerate(self._lines, 1)]
            try:
                self.content, accepted = tomllib.loads("\n".join(texts)), together
            except (tomllib.TOMLDecodeError, RecursionError) as error:
                entry = f"[{'.'.join(path)}] is " if len(path) == 2 else ""
                reason = str(error).partition(" (at ")[0]
                self.faults.append((self._blamed(str(error), lines), f"{entry}not TOML: {reason}"))

    def _blamed(self, message: str, lines: Sequence[int]) -> int:
        """Return the line that a parser's message names; if it names none, the entry's last line with text."""
        match = _NUMBER.search(message)
        texts = [line for line in lines if self._lines[line - 1].strip()]
        return max((line for line in texts if not match or line <= int(match[1])), default=texts[-1])


def _statements(lines: Sequence[str]) -> Iterator[tuple[range, dict[str, Any]]]:
    """Yield line numbers and content of each statement. An invalid line is yielded with empty content."""
    first = 1
    while first <= len(lines):
        last, content = _statement(lines, first)
        yield range(first, last + 1), content
        first = last + 1


def _statement(lines: Sequence[str], first: int) -> tuple[int, dict[str, Any]]:
    """Return the last line and the content of the statement that starts on line `first`."""
    for last in range(first, len(lines) + 1):
        try:
            return last, tomllib.loads("\n".join(lines[first - 1 : last]))
        except tomllib.TOMLDecodeError as error:
            match = _NUMBER.search(str(error))
            if match and int(match[1]) <= last - first:
                break  # an earlier line is invalid, so further lines do not help
        except RecursionError:
            break
    return first, {}


def _paths(content: Any) -> Iterator[_Path]:
    """Yield the path of each key, outer keys first."""
    for key, value in content.items() if isinstance(content, dict) else ():
        yield (key,)
        yield from ((key, *rest) for rest in _paths(value))
