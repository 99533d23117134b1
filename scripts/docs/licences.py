"""Generates the table of installed packages in `THIRD_PARTY_NOTICES.md`.

    python -m scripts.docs.licences

The names come from the pinned requirements of `web`, `worker` and `stack`, the licences from the metadata of the
installed packages. Run it after `scripts/compile_requirements`, in an environment that has all three sets. A test
compares the names in the table with the pinned requirements.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from importlib import metadata
from typing import Final

from shared.settings import ROOT

PAGE: Final = ROOT / "THIRD_PARTY_NOTICES.md"
SETS: Final = ("web", "worker", "stack")
TABLE_HEAD: Final = "| package | licence | installed for |\n| --- | --- | --- |\n"

_TABLE: Final = re.compile(re.escape(TABLE_HEAD) + r"(\|.*\n)*")
_ROW: Final = re.compile(r"^\| ([\w.-]+) \| ([^|]+) \| ([^|]+) \|$", re.MULTILINE)
_PIN: Final = re.compile(r"^([a-z0-9][\w.-]*)(?:\[[^]]*\])?==[^\s;\\]+\s*(?:;\s*([^\\\n]+))?", re.MULTILINE)
_OTHER_PLATFORMS: Final = ("emscripten", "win32")
"""Platforms on which the project does not run."""

ELSEWHERE: Final = {"async-timeout": "Apache-2.0", "mlx-metal": "MIT"}
"""Packages that only another platform or Python version needs, and their licences."""

STRONG_COPYLEFT: Final = re.compile(r"\b(A?GPL|GNU (Affero )?General Public)", re.IGNORECASE)
_SPDX: Final = {
    "3-Clause BSD License": "BSD-3-Clause",
    "Apache 2.0 License": "Apache-2.0",
    "Apache Software License": "Apache-2.0",
    "BSD License": "BSD",
    "BSD-derived (http://www.repoze.org/LICENSE.txt)": "BSD-derived (Repoze)",
    "ISC License (ISCL)": "ISC",
    "MIT License": "MIT",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
}


def pinned() -> dict[str, list[str]]:
    """The packages that are installed at run time, with the sets that need each."""
    found: dict[str, list[str]] = {}
    for name in SETS:
        for package, marker in _PIN.findall((ROOT / f"requirements/{name}.txt").read_text()):
            if not any(platform in marker for platform in _OTHER_PLATFORMS):
                found.setdefault(package, []).append(name)
    return dict(sorted(found.items()))


def listed() -> dict[str, tuple[str, str]]:
    """The packages in the table, with their licence and sets."""
    match = _TABLE.search(PAGE.read_text())
    rows = match[0].removeprefix(TABLE_HEAD) if match else ""
    return {name: (licence, sets) for name, licence, sets in _ROW.findall(rows)}


def table() -> str:
    """The table, from the metadata of the installed packages.

    Raises:
        metadata.PackageNotFoundError: a package is not installed.
    """
    return TABLE_HEAD + "".join(
        f"| {package} | {licence(package)} | {', '.join(sets)} |\n" for package, sets in pinned().items()
    )


def licence(package: str) -> str:
    """A package's licence as its metadata states it, in SPDX form where the metadata says enough for that."""
    if package in ELSEWHERE:
        return ELSEWHERE[package]
    about = metadata.metadata(package).json
    classified = "; ".join(_classified(about.get("classifier", [])))
    stated = str(about.get("license_expression") or classified or about.get("license") or "not stated")
    stated = stated.strip().partition("\n")[0]
    return "; ".join(_SPDX.get(each, each) for each in stated.split("; "))


def _classified(classifiers: str | list[str]) -> Iterator[str]:
    for each in classifiers:
        kind, _, name = each.rpartition(" :: ")
        if kind.startswith("License") and name != "OSI Approved":
            yield name


def main() -> None:
    """Rewrite the table."""
    text = table()
    if copyleft := STRONG_COPYLEFT.search(text):
        sys.exit(f"a package is under a licence that this project does not accept: {copyleft[0]}")
    PAGE.write_text(_TABLE.sub(lambda _: text, PAGE.read_text()))


if __name__ == "__main__":
    main()
