"""Saved runs: a folder per run under docs/bench, and a page that lists them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from shared.settings import ROOT
from tests.bench import charts, goals, tables
from tests.bench.results import Results

FOLDER = ROOT / "docs/bench"
_DATA, _CHARTS, _PAGE = "bench.json", "bench.svg", "README.md"


def default_name(report: dict[str, Any]) -> str:
    """The date and the commit."""
    return f"{report['date'][:10]}-{report['commit'].rstrip('+') or 'unknown'}"


def as_text(report: dict[str, Any]) -> str:
    """Everything that was measured, as JSON."""
    return json.dumps(report, indent=1, default=asdict) + "\n"


def save(report: dict[str, Any], results: Results, name: str = "", folder: Path | None = None) -> Path:
    """Write the data, the charts and the page of a run, and rewrite the list of runs; returns the run's folder."""
    folder = folder or FOLDER
    target = folder / (name or default_name(report))
    target.mkdir(parents=True, exist_ok=True)
    (target / _DATA).write_text(as_text(report), "utf-8")
    drawn = charts.svg(results, _caption(report))
    if drawn:
        (target / _CHARTS).write_text(drawn, "utf-8")
    (target / _PAGE).write_text(_page(target.name, report, results, drawn=bool(drawn)), "utf-8")
    (folder / _PAGE).write_text(_index(folder), "utf-8")
    return target


def _caption(report: dict[str, Any]) -> str:
    memory_gb = report["machine"]["memory_gb"]
    return f"{_machine(report)}, {memory_gb} GB · {report['date'][:10]} · commit {report['commit'] or 'unknown'}"


def _machine(report: dict[str, Any]) -> str:
    machine = report["machine"]
    return f"{machine['cpu']}, {machine['cores']} cores" + (f", {machine['gpu']}" if machine["gpu"] else "")


def _page(name: str, report: dict[str, Any], results: Results, *, drawn: bool) -> str:
    machine = report["machine"]
    versions = ", ".join(f"{package} {number}" for package, number in report["versions"].items())
    parts = [
        f"# {name}",
        (
            f"Commit {report['commit']}, {report['date']}. {_machine(report)}, {machine['memory_gb']} GB, "
            f"{machine['os']}, Python {report['python']}, {versions}. "
            f"Command: `{report['command']}`. All figures of every round: "
            f"[{_DATA}]({_DATA})."
        ),
        f"![Charts of the figures in the table]({_CHARTS})" if drawn else "",
        tables.markdown(results).strip(),
        "\n".join(f"- {line}" for line in [*report["lines"], *tables.absences(results)]),
        _verdicts(results),
    ]
    return "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"


def _verdicts(results: Results) -> str:
    rows = [
        f"| {each['goal']} | {each['found']:.3g} | {each['wanted']} | {'reached' if each['reached'] else 'missed'} |"
        for each in goals.verdicts(results)
    ]
    return "\n".join(["| goal | measured | target | |", "| --- | --: | --- | --- |", *rows]) if rows else ""


def _index(folder: Path) -> str:
    head = (
        "# Saved runs\n\nEach folder is one run of `scripts/bench --save`: a page, charts, and all data.\n\n"
        "| run | date | commit | machine |\n| --- | --- | --- | --- |\n"
    )
    return head + "".join(_index_row(path) for path in sorted(folder.glob(f"*/{_DATA}"), reverse=True))


def _index_row(path: Path) -> str:
    report = json.loads(path.read_text("utf-8"))
    name = path.parent.name
    return f"| [{name}]({name}/{_PAGE}) | {report['date'][:10]} | {report['commit']} | {_machine(report)} |\n"
