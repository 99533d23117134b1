"""Figures that are kept: a folder a version under docs/bench, and a page that lists them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from shared.settings import ROOT
from tests.bench import goals, tables
from tests.bench.charts import picture
from tests.bench.results import Results

FOLDER = ROOT / "docs/bench"
_DATA, _PICTURE, _PAGE = "bench.json", "bench.svg", "README.md"


def default_name(report: dict[str, Any]) -> str:
    """Date and commit."""
    return f"{report['date'][:10]}-{report['commit'].rstrip('+') or 'unknown'}"


def as_text(report: dict[str, Any]) -> str:
    """Everything measured, as JSON."""
    return json.dumps(report, indent=1, default=asdict) + "\n"


def save(report: dict[str, Any], results: Results, name: str = "", folder: Path | None = None) -> Path:
    """Write data, picture and page of a run, and the list of all runs anew; the run's folder."""
    folder = folder or FOLDER
    target = folder / (name or default_name(report))
    target.mkdir(parents=True, exist_ok=True)
    (target / _DATA).write_text(as_text(report), "utf-8")
    (target / _PICTURE).write_text(picture(results), "utf-8")
    (target / _PAGE).write_text(_page(target.name, report, results), "utf-8")
    (folder / _PAGE).write_text(_index(folder), "utf-8")
    return target


def _page(name: str, report: dict[str, Any], results: Results) -> str:
    machine = report["machine"]
    versions = ", ".join(f"{package} {number}" for package, number in report["versions"].items())
    parts = [
        f"# {name}",
        f"Commit {report['commit']}, {report['date']}. {machine['cpu']}, {machine['cores']} cores"
        + (f", {machine['gpu']}" if machine["gpu"] else "")
        + f", {machine['memory_gb']} GB, {machine['os']}, Python {report['python']}, {versions}. "
        f"Command: `{report['command']}`. All figures, round by round: [{_DATA}]({_DATA}).",
        f"![Speed by clients, TTFT by load]({_PICTURE})",
        tables.markdown(results).strip(),
        "\n".join(f"- {line}" for line in [*report["lines"], *tables.absences(results)]),
        _verdicts(results),
    ]
    return "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"


def _verdicts(results: Results) -> str:
    rows = (
        f"| {each['goal']} | {each['found']:.3g} | {each['wanted']} | {'reached' if each['reached'] else 'missed'} |"
        for each in goals.verdicts(results)
    )
    return "\n".join(["| goal | found | wanted | |", "| --- | --: | --- | --- |", *rows])


def _index(folder: Path) -> str:
    head = (
        "# Figures by version\n\nEach folder is one run of `scripts/bench --save`: a page, a picture, and all data.\n\n"
        "| run | date | commit | machine |\n| --- | --- | --- | --- |\n"
    )
    return head + "".join(_index_row(path) for path in sorted(folder.glob(f"*/{_DATA}"), reverse=True))


def _index_row(path: Path) -> str:
    report = json.loads(path.read_text("utf-8"))
    machine = report["machine"]
    where = f"{machine['cpu']}, {machine['cores']} cores" + (f", {machine['gpu']}" if machine["gpu"] else "")
    return (
        f"| [{path.parent.name}]({path.parent.name}/{_PAGE}) | {report['date'][:10]} | {report['commit']} | {where} |\n"
    )
