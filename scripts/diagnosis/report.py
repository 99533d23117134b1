"""The report of `scripts/doctor`: facts and problems by section, as Markdown or JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

_MIB: Final = 2**20
_GIB: Final = 2**30


@dataclass(slots=True)
class Section:
    """What one check found.

    Attributes:
        facts: values by name, in the order in which they are shown.
        problems: one sentence each that says what is wrong and what to do.
    """

    title: str
    facts: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def as_markdown(sections: Sequence[Section]) -> str:
    """Return the report as text that also reads well without rendering: problems first."""
    problems = [f"{section.title}: {problem}" for section in sections for problem in section.problems]
    parts = [_list("Problems", problems or ["none found"])]
    parts += [
        _list(section.title, [f"{name}: {value}" for name, value in section.facts.items()])
        for section in sections
        if section.facts
    ]
    return _without_home("# mlxq doctor\n\n" + "\n\n".join(parts))


def as_json(sections: Sequence[Section]) -> str:
    """Return the report as JSON."""
    problems = [{"section": section.title, "problem": problem} for section in sections for problem in section.problems]
    facts = {section.title: section.facts for section in sections}
    return _without_home(json.dumps({"ok": not problems, "problems": problems, "sections": facts}, indent=2))


def size(count: int) -> str:
    """Return a number of bytes in MiB or GiB."""
    return f"{count / _GIB:.1f} GiB" if count >= _GIB else f"{count / _MIB:.0f} MiB"


def _list(title: str, lines: Sequence[str]) -> str:
    # Markdown would end an item at a line break.
    return "\n".join([f"## {title}", "", *(f"- {' '.join(line.splitlines())}" for line in lines)])


def _without_home(text: str) -> str:
    """Hide the name of the user in paths, because reports are published."""
    home = str(Path.home())
    return text if home == "/" else text.replace(f"{home}/", "~/")
