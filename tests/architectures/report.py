"""`scripts/test_architectures`: checks tiny random models of every architecture and writes the results into the docs.

Each architecture runs in a process of its own, because a model may end it.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Final, TypeAlias

from rich.console import Console
from rich.progress import track

from shared.settings import ROOT

PAGE: Final = ROOT / "docs/models.md"
LIMIT_S: Final = 900.0
"""Maximum time for the checks of an architecture on a busy machine."""
_SECTION: Final = re.compile(r"(?<=<!-- written by scripts/test_architectures -->\n).*?(?=<!-- end -->)", re.DOTALL)

WORKS, LIMITED, FAILED = "yes", "-", "**no**"

Outcome: TypeAlias = tuple[str, str]
"""Whether a check works, and the reason if not."""
Outcomes: TypeAlias = dict[str, Outcome]
"""By check."""


def run_checks(name: str) -> tuple[str, str, Outcomes]:
    """Run all checks of an architecture in this process.

    Returns:
        The kind of the architecture, how its rows share passes, and the outcomes.
    """
    from tests.architectures.checks import CHECKS, batching
    from tests.architectures.kinds import kind_of
    from tests.support.architectures import make

    support = batching(name)
    shared = " / ".join(dict.fromkeys((support.prefill, support.decode))).replace("_", " ")
    outcomes = {}
    for check, each in CHECKS.items():
        with tempfile.TemporaryDirectory() as folder:
            outcomes[check] = _outcome(each.run, name, Path(folder))
    return str(kind_of(make(name))), shared, outcomes


def _outcome(run: object, name: str, folder: Path) -> Outcome:
    from tests.architectures.folders import Unsupported

    try:
        run(name, folder)  # type: ignore[operator]
    except Unsupported as error:
        return LIMITED, str(error)
    except Exception as error:  # noqa: BLE001 - any error is the outcome
        return FAILED, f"{type(error).__name__}: {error}".splitlines()[0]
    return WORKS, ""


def run_apart(name: str) -> tuple[str, str, Outcomes]:
    """Run all checks of an architecture in a process of its own."""
    command = [sys.executable, "-P", "-m", "tests.architectures.report", "--one", name]
    try:
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S, check=False)
        kind, shared, outcomes = json.loads(ended.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        return "", "", {"all": (FAILED, f"the process ended with {ended.returncode}: {ended.stderr[-200:].strip()}")}
    except subprocess.TimeoutExpired:
        return "", "", {"all": (FAILED, f"the checks took more than {LIMIT_S:.0f} s")}
    return kind, shared, {check: (found, reason) for check, (found, reason) in outcomes.items()}


def table(rows: Mapping[str, tuple[str, str, Outcomes]], columns: Mapping[str, Sequence[str]]) -> str:
    """Return the table.

    Args:
        rows: what `run_checks` returns, by architecture.
        columns: the checks of each column, by heading.
    """
    lines = [
        "| architecture | keeps | rows that share passes | " + " | ".join(columns) + " |",
        "| --- " * (3 + len(columns)) + "|",
    ]
    for name, (kind, shared, outcomes) in rows.items():
        cells = (_cell([outcomes.get(check, (FAILED, "")) for check in checks], checks) for checks in columns.values())
        lines.append(f"| {name} | {kind} | {shared} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(outcomes: Sequence[Outcome], checks: Sequence[str]) -> str:
    """Return one cell for several checks: what all of them are, or those that do not work."""
    all_found = {found for found, _ in outcomes}
    if len(all_found) == 1:
        return all_found.pop()
    exceptions = [
        check.removeprefix("quantised to ")
        for check, (found, _) in zip(checks, outcomes, strict=True)
        if found != WORKS
    ]
    return f"{FAILED if FAILED in all_found else WORKS} (not {', '.join(exceptions)})"


def section(rows: Mapping[str, tuple[str, str, Outcomes]]) -> str:
    """Return the generated section of the page."""
    from tests.architectures.checks import CHECKS

    columns: dict[str, list[str]] = {}
    for name, check in CHECKS.items():
        columns.setdefault(check.column, []).append(name)
    versions = ", ".join(f"{library} {version(library)}" for library in ("mlx", "mlx-lm"))
    works = sum(all(found != FAILED for found, _ in outcomes.values()) for _, _, outcomes in rows.values())
    failures = [
        f"- {name}, {check}: {reason}"
        for name, (_, _, outcomes) in rows.items()
        for check, (found, reason) in outcomes.items()
        if found == FAILED
    ]
    text = f"\n{len(rows)} architectures, {versions}, on a CPU; {works} without a failure.\n\n{table(rows, columns)}\n"
    return text + _other_names(rows) + ("Failures:\n\n" + "\n".join(failures) + "\n\n" if failures else "")


def _other_names(rows: Collection[str]) -> str:
    """Return the values of `model_type` that mlx-lm runs as one of these architectures."""
    from mlx_lm.utils import MODEL_REMAPPING

    others = [f"`{name}` as {runs_as}" for name, runs_as in sorted(MODEL_REMAPPING.items()) if runs_as in rows]
    return f"Other values of `model_type`: {', '.join(others)}.\n\n" if others else ""


def main(argv: Iterable[str] | None = None) -> int:
    """Run the command; return the exit status."""
    parser = argparse.ArgumentParser(prog="scripts/test_architectures", description=(__doc__ or "").split(": ", 1)[1])
    parser.add_argument(
        "names", nargs="*", help="architectures to check and print; without names, all are checked and written"
    )
    parser.add_argument("--vision", action="store_true", help="check the families of vision models instead")
    parser.add_argument("--one", metavar="NAME", help=argparse.SUPPRESS)
    arguments = parser.parse_args(list(argv) if argv is not None else None)
    if arguments.vision:
        return _check_vision(arguments.names, arguments.one)
    if arguments.one:
        print(json.dumps(run_checks(arguments.one)))
        return 0
    from tests.support.architectures import names

    chosen = arguments.names or names()
    rows = {name: run_apart(name) for name in track(chosen, "checking", console=Console(stderr=True))}
    text = section(rows)
    if arguments.names:
        print(text)
    else:
        PAGE.write_text(_SECTION.sub(lambda _: text, PAGE.read_text()))
    return int(any(found == FAILED for _, _, outcomes in rows.values() for found, _ in outcomes.values()))


def _check_vision(names: Sequence[str], one: str | None) -> int:
    from tests.architectures import vision_report
    from tests.architectures.vision_models import VISION_MODELS

    if one:
        print(json.dumps(vision_report.run_checks(one)))
        return 0
    chosen = names or list(VISION_MODELS)
    families = {name: vision_report.run_apart(name) for name in track(chosen, "checking", console=Console(stderr=True))}
    text = vision_report.section(families)
    if names:
        print(text)
    else:
        vision_report.write(text)
    return int(any(any(outcomes.values()) for outcomes in families.values()))


if __name__ == "__main__":
    sys.exit(main())
