"""The text of a catalog: what it says, also where a part of it is no TOML, and on which line it says so."""

from __future__ import annotations

import re
import tomllib
from typing import Any, Final

_TABLE: Final = re.compile(r"\s*\[")
_ENTRY: Final = re.compile(r"\s*\[\s*[\"']?models[\"']?\s*\.\s*(?:\"([^\"]*)\"|'([^']*)'|([\w-]+))\s*[.\]]")
_NUMBER: Final = re.compile(r"\(at line (\d+), column \d+\)$")


class CatalogText:
    """A file of tables [models.NAME].

    Attributes:
        content: what it says, without the entries that are no TOML.
        faults: (line, what is wrong) of those.
    """

    def __init__(self, text: str) -> None:
        self._lines = text.splitlines()
        self.faults: list[tuple[int, str]] = []
        self.content = self._parse()

    def line(self, name: str = "", key: str = "", table: str = "") -> int:
        """Where a key stands in an entry, or in a table of it; else the entry. Without a name: above all entries."""
        start = next((i for i, line in enumerate(self._lines, 1) if name and _opens(line, name, table)), 0)
        if name and not start:
            return self._headless(name, key)
        for number, line in enumerate(self._lines[start:], start + 1):
            if _TABLE.match(line):
                break
            if key and re.match(rf"\s*[\"']?{re.escape(key)}[\"']?\s*[=.]", line):
                return number
        return max(start, 1)

    def _headless(self, name: str, key: str) -> int:
        """The same of an entry without a header of its own: `two.slots = 1`, `two = {…}`, `[[models.two]]`."""
        entry = rf"\s*\[*\s*(?:[\"']?models[\"']?\s*\.\s*)?[\"']?{re.escape(name)}[\"']?\s*"
        places = [rf"{entry}\.\s*[\"']?{re.escape(key)}[\"']?\s*[=.]", rf"{entry}[=.\]]"]
        found = (n for place in places for n, line in enumerate(self._lines, 1) if re.match(place, line))
        return next(found, 1)

    def has_table(self, name: str, table: str) -> bool:
        """Whether a table of an entry stands by itself."""
        return any(_opens(line, name, table) for line in self._lines)

    def _parse(self) -> dict[str, Any]:
        while True:
            try:
                return tomllib.loads("\n".join(self._lines))
            except (tomllib.TOMLDecodeError, RecursionError) as error:
                self._do_without(str(error))

    def _do_without(self, what: str) -> None:
        """Empty the lines of the entry that is no TOML, in all its tables; the others keep their numbers."""
        number = self._blamed(what)
        begin = next((i for i in range(number - 1, -1, -1) if _TABLE.match(self._lines[i])), 0)
        name = _name(self._lines[begin])
        said = what.partition(" (at ")[0]
        self.faults.append((number, f"[models.{name}] is not TOML: {said}" if name else f"not TOML: {said}"))
        gone = False
        for i, line in enumerate(self._lines):
            if _TABLE.match(line):
                gone = i == begin or (name is not None and _name(line) == name)
            if gone or begin <= i < number:
                self._lines[i] = ""

    def _blamed(self, what: str) -> int:
        """The line to which a fault is laid, never an empty one; where something has no end, the last."""
        said = [number for number, line in enumerate(self._lines, 1) if line.strip()]
        found = _NUMBER.search(what)
        number = max((each for each in said if found and each <= int(found[1])), default=said[-1])
        line = self._lines[number - 1]
        if "twice" not in what and _TABLE.match(line) and _is_toml(line):
            # A header that is right by itself: what stands before it has no end.
            return max((each for each in said if each < number), default=number)
        return number


def _opens(line: str, name: str, table: str) -> bool:
    """Whether a line opens an entry, or that table in it."""
    found = _ENTRY.match(line)
    return found is not None and _name(line) == name and line[found.end() - 1 :].strip(" .\"']\t").startswith(table)


def _name(line: str) -> str | None:
    """The entry that a line opens, or a table of which it opens."""
    found = _ENTRY.match(line)
    return next((name for name in found.groups() if name is not None), None) if found else None


def _is_toml(line: str) -> bool:
    try:
        return bool(tomllib.loads(line))
    except tomllib.TOMLDecodeError:
        return False
