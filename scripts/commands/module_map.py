"""Writes docs/modules.md: every module with the first sentence of its docstring, a table a folder.

    python -m scripts.commands.module_map

A test holds the page against the code.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from shared.settings import ROOT

PAGE = ROOT / "docs/modules.md"
_HEAD = """\
# Modules

What each file is for, in its own words; `python -m scripts.commands.module_map` writes this page.
How they work together: [architecture.md](architecture.md).
"""
_FOLDERS = ("shared", "web", "worker", "scripts")


def page() -> str:
    """The text of the page."""
    by_folder = groupby(_modules(), key=lambda module: module.parent)
    return _HEAD + "".join(_section(folder, modules) for folder, modules in by_folder)


def _modules() -> list[Path]:
    found = (path.relative_to(ROOT) for folder in _FOLDERS for path in (ROOT / folder).rglob("*.py"))
    return sorted((path for path in found if _purpose(path)), key=lambda path: (path.parent.parts, path.name))


def _section(folder: Path, modules: Iterator[Path]) -> str:
    rows = "".join(f"| `{module.name}` | {_purpose(module)} |\n" for module in modules)
    return f"\n## {folder}/\n\n| file | what |\n| --- | --- |\n{rows}"


def _purpose(module: Path) -> str:
    """The first paragraph of its docstring; empty for a package that only exists."""
    said = ast.get_docstring(ast.parse((ROOT / module).read_text(encoding="utf-8"))) or ""
    return " ".join(said.split("\n\n", maxsplit=1)[0].split()).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
