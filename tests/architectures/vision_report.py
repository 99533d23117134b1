"""`scripts/test_architectures --vision`: checks tiny models of every vision family, and writes docs/models.md."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Final

from shared.settings import ROOT

PAGE: Final = ROOT / "docs/models.md"
LIMIT_S: Final = 900.0
"""Maximum time for the checks of a family on a busy machine."""
_SECTION: Final = re.compile(
    r"(?<=<!-- written by scripts/test_architectures --vision -->\n).*?(?=<!-- end of vision families -->)", re.DOTALL
)


def run_checks(name: str) -> dict[str, str]:
    """Run all checks of a family in this process. Returns by check why it fails, or an empty text."""
    from tests.architectures.vision_checks import CHECKS, Subject

    outcomes = {}
    with tempfile.TemporaryDirectory() as folder:
        subject = Subject(name, Path(folder))
        for check, run in CHECKS.items():
            try:
                run(subject)
            except Exception as error:  # noqa: BLE001 - any error is the outcome
                outcomes[check] = f"{type(error).__name__}: {error}".splitlines()[0]
            else:
                outcomes[check] = ""
    return outcomes


def run_apart(name: str) -> dict[str, str]:
    """Run all checks of a family in a process of its own, because a model may end it."""
    command = [sys.executable, "-P", "-m", "tests.architectures.report", "--vision", "--one", name]
    try:
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S, check=False)
        outcomes: dict[str, str] = json.loads(ended.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        return {"all": f"the process ended with {ended.returncode}: {ended.stderr[-200:].strip()}"}
    except subprocess.TimeoutExpired:
        return {"all": f"the checks took more than {LIMIT_S:.0f} s"}
    return outcomes


def section(families: Mapping[str, Mapping[str, str]]) -> str:
    """Return the generated section of the page."""
    from tests.architectures.vision_checks import CHECKS

    lines = ["| family | " + " | ".join(CHECKS) + " |", "| --- " * (1 + len(CHECKS)) + "|"]
    for name, outcomes in families.items():
        cells = ("**no**" if outcomes.get(check, outcomes.get("all")) else "yes" for check in CHECKS)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    failures = [f"- {name}, {check}: {text}" for name, all_ in families.items() for check, text in all_.items() if text]
    versions = ", ".join(f"{library} {version(library)}" for library in ("mlx", "mlx-lm", "mlx-vlm"))
    text = f"\n{versions}, on a CPU.\n\n" + "\n".join(lines) + "\n\n"
    return text + ("Failures:\n\n" + "\n".join(failures) + "\n\n" if failures else "")


def write(text: str) -> None:
    """Write the section into the page."""
    PAGE.write_text(_SECTION.sub(lambda _: text, PAGE.read_text()))
