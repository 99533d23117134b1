"""`scripts/bench`: measures this stack, the libraries' own servers and the bare library in turns, on one machine.

Absolute figures depend on the machine; compare the ratios.
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
from tests.bench.parts import PARTS, Options, Part
from tests.bench.peers import PEERS
from tests.bench.results import Results
from tests.bench.scenarios.base import QUICK, Sizes
from tests.bench.scenarios.registry import SCENARIOS
from tests.bench.turns import Selection, turns
from tests.bench.turns import measure as measure_turn

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
    add("--quick", action="store_true", help="tiny model, small loads, one round: checks that the bench works")
    add(
        "--scenario",
        nargs="+",
        choices=list(SCENARIOS),
        default=list(SCENARIOS),
        metavar="NAME",
        help="one or more of %(choices)s",
    )
    add(
        "--who",
        nargs="+",
        choices=list(CONTENDERS),
        default=list(CONTENDERS),
        metavar="NAME",
        help="one or more of %(choices)s",
    )
    add(
        "--rounds",
        type=int,
        default=3,
        help="turns of each contender (default %(default)s; long scenarios run once)",
    )
    add("--model", type=Path, nargs="+", default=[], help="model folders (default: SmolLM2 and the tiny model)")
    add("--clients", type=int, nargs="+", help="concurrent clients in closed loops (default 1 8 32 64)")
    add("--tokens", type=int, help="tokens of each answer (default 48; 128 for the tiny model)")
    add("--seconds", type=float, help="duration of open loops (default 60)")
    add(
        "--vision-model",
        type=Path,
        nargs="+",
        default=[VISION],
        help="folders of models that take images (default models/tiny-random-qwen2.5-vl)",
    )
    add(
        "--only",
        choices=(LOAD, *PARTS),
        help="only the scenarios (load), or only one of the parts that measure this stack alone",
    )
    add("--before", type=Path, metavar="FOLDER", help="an earlier checkout to compare this one with, in parts that can")
    add("--install", nargs="+", choices=list(PEERS), help="install servers of other projects to compare with, and exit")
    add("--json", type=Path, help="write all figures to this file")
    add(
        "--save",
        nargs="?",
        const="",
        metavar="NAME",
        help="save data, charts and a page under docs/bench/NAME (default: date and commit)",
    )
    args = parser.parse_args(argv)
    if args.before is not None:
        args.before = args.before.resolve()
    elif args.only in PARTS and PARTS[args.only].compares:
        parser.error(f"--only {args.only} needs --before FOLDER")
    return args


def selection(args: argparse.Namespace) -> Selection:
    """What the command line selects."""
    folders = args.model or ([TINY] if args.quick else [SMOLLM2, TINY])
    return Selection(
        models={path.resolve(): _sizes(args, path) for path in folders},
        scenarios=[name for name in args.scenario if name != "single" or 1 in (args.clients or [1])],
        contenders=args.who,
        rounds=1 if args.quick else args.rounds,
        vision=[path.resolve() for path in args.vision_model if path.is_dir()],
        one_start=args.quick,
    )


def _sizes(args: argparse.Namespace, model: Path) -> Sizes:
    sizes = QUICK if args.quick else Sizes(tokens=128 if model == TINY else 48)
    given = {"tokens": args.tokens, "open_s": args.seconds}
    if args.clients:
        given["clients"] = tuple(number for number in args.clients if number > 1)
    return replace(sizes, **{name: value for name, value in given.items() if value is not None})


def measure(chosen: Selection, console: Console) -> tuple[Results, bool]:
    """Run all turns; the results, and whether they are complete (not interrupted)."""
    results = Results()
    due = list(turns(chosen, results.add_absence))
    try:
        for turn in track(due, "measuring", console=console):
            console.print(str(turn), highlight=False)
            measure_turn(turn, results)
    except KeyboardInterrupt:
        return results, False
    return results, True


def add_bandwidth(chosen: Selection, results: Results) -> dict[str, Any]:
    """Measure the memory bandwidth, and add the limit that it sets to the figures of single clients."""
    large = [model for model in chosen.models if bandwidth.bytes_per_token(model) > bandwidth.CACHED_BYTES]
    if not large or "single" not in chosen.scenarios:
        return {}
    speed = bandwidth.measured()
    limits = {model.name: bandwidth.limit(model, speed) for model in large}
    for record in results.records:
        if record.place.scenario == "single" and record.place.model in limits:
            record.figures["bandwidth_tokens_per_s"] = limits[record.place.model]["tokens_per_s"]
    return {"measured": speed, **limits}


def due_parts(args: argparse.Namespace) -> list[tuple[str, Part]]:
    """The parts that the command line selects."""
    if args.only in PARTS:
        return [(args.only, PARTS[args.only])]
    before = args.before is not None
    return [each for each in PARTS.items() if args.only is None and each[1].due(quick=args.quick, before=before)]


def install(names: Sequence[str]) -> int:
    """Install servers of other projects; the exit status."""
    try:
        for name in names:
            PEERS[name].install()
    except subprocess.CalledProcessError:
        return FLAWED
    return OK


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what the command line selects, print it, and write it if asked to; the exit status."""
    given = sys.argv[1:] if argv is None else argv
    args = arguments(given)
    if args.install:
        return install(args.install)
    console = Console(width=None if sys.stdout.isatty() else _WIDTH, highlight=False)
    report: dict[str, Any] = {**machine.about(), "command": shlex.join(["scripts/bench", *given]), "lines": []}
    results, complete = Results(), True
    if args.only in (None, LOAD):
        results, complete = _measure_load(args, report, console)
    for name, part in due_parts(args) if complete else ():
        _measure_part(name, part, args, report, console)
    report |= {**results.to_json(), "goals": goals.verdicts(results)}
    if args.json:
        args.json.write_text(saving.as_text(report), "utf-8")
    if args.save is not None:
        console.print(f"saved in {saving.save(report, results, args.save)}", markup=False)
    if not complete:
        return INTERRUPTED
    return FLAWED if any(absence.fault for absence in results.absences) else OK


def _measure_load(args: argparse.Namespace, report: dict[str, Any], console: Console) -> tuple[Results, bool]:
    """Run the scenarios and print their figures; the results, and whether they are complete."""
    chosen = selection(args)
    results, complete = measure(chosen, Console(stderr=True))
    report["bandwidth"] = add_bandwidth(chosen, results)
    report["lines"] += bandwidth.lines(report["bandwidth"])
    console.print(tables.terminal(results))
    for line in (*report["lines"], *tables.absences(results), *([] if args.quick else goals.lines(results))):
        console.print(line, markup=False)
    return results, complete


def _measure_part(name: str, part: Part, args: argparse.Namespace, report: dict[str, Any], console: Console) -> None:
    model = args.model[0] if args.model and args.only == name else TINY
    report[name] = part.measure(Options(model.resolve(), args.rounds, args.before))
    shown = part.show(report[name])
    report["lines"] += [shown] if isinstance(shown, str) else []
    console.print(shown, markup=False)


if __name__ == "__main__":
    # SIGTERM acts like Ctrl-C: stop what has been started, and print the figures so far.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    raise SystemExit(main())
