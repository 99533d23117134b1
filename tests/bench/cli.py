"""`scripts/bench`: this stack, the libraries' own servers and the bare library, on one machine, in one run, in turns.

Figures depend on the machine: read the ratios.
"""

from __future__ import annotations

import argparse
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.progress import track

from shared.settings import ROOT
from tests.bench import bandwidth, goals, machine, saving, tables
from tests.bench.contenders import CONTENDERS
from tests.bench.parts import PARTS, Part, Subject
from tests.bench.peers import PEERS
from tests.bench.results import Results
from tests.bench.scenarios.base import QUICK, Sizes
from tests.bench.scenarios.registry import SCENARIOS
from tests.bench.turns import Question, take, turns

SMOLLM2: Final = ROOT / "models/SmolLM2-135M-Instruct"
TINY: Final = ROOT / "models/tiny-random-llama"
VISION: Final = ROOT / "models/tiny-random-qwen2.5-vl"
LOAD: Final = "load"
OK, FLAWED, INTERRUPTED = 0, 1, 130
_WIDTH = 190


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="scripts/bench", description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("--quick", action="store_true", help="the tiny model, small loads, one round: whether it works at all")
    add(
        "--scenario", nargs="+", choices=list(SCENARIOS), default=list(SCENARIOS), metavar="NAME", help="of %(choices)s"
    )
    add("--who", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS), metavar="NAME", help="of %(choices)s")
    add(
        "--rounds",
        type=int,
        default=3,
        help="turns of each contender (default %(default)s; long scenarios have one)",
    )
    add("--model", type=Path, nargs="+", default=[], help="model folders instead of SmolLM2 and the tiny one")
    add("--clients", type=int, nargs="+", help="at once, in closed loops (default 1 8 32 64)")
    add("--tokens", type=int, help="of each answer (default 48; 128 for the tiny model)")
    add("--seconds", type=float, help="that requests come in open loops (default 60)")
    add("--vision-model", type=Path, default=VISION, help="model folder for images (default %(default)s)")
    add("--only", choices=(LOAD, *PARTS), help="the scenarios, or one of the parts that measure this stack")
    add("--before", type=Path, metavar="FOLDER", help="an earlier checkout, for parts that measure it beside this one")
    add("--install", nargs="+", choices=list(PEERS), help="install servers to compare with, and measure nothing")
    add("--json", type=Path, help="write everything measured there")
    add("--save", nargs="?", const="", metavar="NAME", help="keep it under docs/bench/NAME (default: date and commit)")
    asked = parser.parse_args(argv)
    if asked.before is not None:
        asked.before = asked.before.resolve()
    elif asked.only in PARTS and PARTS[asked.only].compares:
        parser.error(f"--only {asked.only} needs --before FOLDER")
    return asked


def question(asked: argparse.Namespace) -> Question:
    """What the command line asks."""
    models = {
        path.resolve(): _sizes(asked, path) for path in asked.model or ([TINY] if asked.quick else [SMOLLM2, TINY])
    }
    scenarios = [name for name in asked.scenario if name != "single" or 1 in (asked.clients or [1])]
    return Question(
        models=models,
        scenarios=scenarios,
        contenders=asked.who,
        rounds=1 if asked.quick else asked.rounds,
        vision=asked.vision_model.resolve() if asked.vision_model.is_dir() else None,
        at_once=asked.quick,
    )


def _sizes(asked: argparse.Namespace, model: Path) -> Sizes:
    sizes = QUICK if asked.quick else Sizes(tokens=128 if model == TINY else 48)
    given = {"tokens": asked.tokens, "open_s": asked.seconds}
    if asked.clients:
        given["clients"] = tuple(number for number in asked.clients if number > 1)
    return replace(sizes, **{name: value for name, value in given.items() if value is not None})


def measure(asked: Question, console: Console) -> tuple[Results, bool]:
    """All turns; what there is, and whether that is all."""
    results = Results()
    due = list(turns(asked, results.leave_out))
    try:
        for turn in track(due, "measuring", console=console):
            console.print(str(turn), highlight=False)
            take(turn, results)
    except KeyboardInterrupt:
        return results, False
    return results, True


def add_bandwidth(asked: Question, results: Results) -> dict[str, Any]:
    """What the memory allows one client with each model, beside the figures of single clients."""
    large = [model for model in asked.models if bandwidth.bytes_per_token(model) > bandwidth.CACHED_BYTES]
    if not large or "single" not in asked.scenarios:
        return {}
    speed = bandwidth.measured()
    limits = {model.name: bandwidth.limit(model, speed) for model in large}
    for record in results.records:
        if record.place.scenario == "single" and record.place.model in limits:
            record.figures["bandwidth_tokens_per_s"] = limits[record.place.model]["tokens_per_s"]
    return {"measured": speed, **limits}


def due_parts(asked: argparse.Namespace) -> list[tuple[str, Part]]:
    """The parts that the command line asks for."""
    if asked.only in PARTS:
        return [(asked.only, PARTS[asked.only])]
    before = asked.before is not None
    return [each for each in PARTS.items() if asked.only is None and each[1].due(quick=asked.quick, before=before)]


def install(names: Sequence[str]) -> int:
    """Make environments for servers of other projects; the exit status."""
    try:
        for name in names:
            PEERS[name].install()
    except subprocess.CalledProcessError:
        return FLAWED
    return OK


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what was asked, print it, perhaps write it."""
    given = sys.argv[1:] if argv is None else argv
    asked = arguments(given)
    if asked.install:
        return install(asked.install)
    console = Console(width=None if sys.stdout.isatty() else _WIDTH, highlight=False)
    progress = Console(stderr=True)
    report: dict[str, Any] = {**machine.about(), "command": shlex.join(["scripts/bench", *given]), "lines": []}
    results, whole = Results(), True
    if asked.only in (None, LOAD):
        wanted = question(asked)
        results, whole = measure(wanted, progress)
        report["bandwidth"] = add_bandwidth(wanted, results)
        report["lines"] += bandwidth.lines(report["bandwidth"])
        console.print(tables.terminal(results))
        for line in (*report["lines"], *tables.absences(results), *([] if asked.quick else goals.lines(results))):
            console.print(line, markup=False)
    for name, part in due_parts(asked) if whole else ():
        model = asked.model[0] if asked.model and asked.only == name else TINY
        report[name] = part.measure(Subject(model.resolve(), asked.rounds, asked.before))
        shown = part.show(report[name])
        report["lines"] += [shown] if isinstance(shown, str) else []
        console.print(shown, markup=False)
    report |= {**results.to_json(), "goals": goals.verdicts(results)}
    if asked.json:
        asked.json.write_text(saving.as_text(report), "utf-8")
    if asked.save is not None:
        console.print(f"kept in {saving.save(report, results, asked.save)}", markup=False)
    if not whole:
        return INTERRUPTED
    return FLAWED if any(absence.fault for absence in results.absences) else OK


if __name__ == "__main__":
    # Ended like this, too, it ends what it has started and tells what it has found.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    raise SystemExit(main())
