"""`scripts/bench`: this stack, mlx_lm.server and the bare library, on one machine, in one run, in turns.

Every contender runs alone, in rounds (A B C, A B C, …), so that a machine that drifts drifts for all; what is
printed is the median of the rounds. Figures depend on the machine: read the ratios.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from scripts.commands.benching import durability
from scripts.commands.benching.contenders import CONTENDERS
from scripts.commands.benching.hop import queue_hop
from scripts.commands.benching.load import Burst
from scripts.commands.benching.streams import idle_streams
from shared.settings import ROOT


@dataclass(frozen=True, slots=True)
class Case:
    """One line of the question: a model folder, clients at once, tokens each."""

    model: Path
    clients: int
    tokens: int


DEFAULT_CASES = (
    Case(ROOT / "models/SmolLM2-135M-Instruct", 1, 48),
    Case(ROOT / "models/SmolLM2-135M-Instruct", 8, 48),
    Case(ROOT / "models/SmolLM2-135M-Instruct", 32, 48),
    Case(ROOT / "models/tiny-random-llama", 1, 128),
    Case(ROOT / "models/tiny-random-llama", 32, 128),
    Case(ROOT / "models/tiny-random-llama", 64, 128),
)

Results = dict[str, dict[str, list[Burst]]]
"""case name → contender → a burst a round"""


def name_of(case: Case) -> str:
    """How a case is called in the table."""
    return f"{case.model.name}, {case.clients} x {case.tokens}"


def measure(cases: Sequence[Case], contenders: Sequence[str], rounds: int, warmup: bool = True) -> Results:
    """All cases for all contenders; each contender is started once a round and model."""
    results: Results = {name_of(case): {name: [] for name in contenders} for case in cases}
    models = list(dict.fromkeys(case.model for case in cases))
    turns = [(r, model, name) for r in range(rounds) for model in models for name in contenders]
    for _, model, name in track(turns, "measuring", console=Console(stderr=True)):
        own = [case for case in cases if case.model == model]
        with CONTENDERS[name](model, max(32, *(case.clients for case in own))) as contender:
            if warmup:
                contender.run(2, 8)
            for case in own:
                results[name_of(case)][name].append(contender.run(case.clients, case.tokens))
    return results


def median(bursts: Iterable[Burst], figure: str) -> float:
    """The median of a figure over rounds."""
    return float(statistics.median(getattr(each, figure) for each in bursts))


def table(results: Results) -> Table:
    """What people read."""
    out = Table("case", "who", title="tokens/s, seconds; median of the rounds")
    for heading in ("tok/s", "of mlx_lm.server", "TTFT p50", "TTFT p99", "gap p50", "gap p99"):
        out.add_column(heading, justify="right")
    for case, contenders in results.items():
        peer = contenders.get("mlx_lm.server")
        for i, (who, bursts) in enumerate(contenders.items()):
            speed = median(bursts, "tokens_per_s")
            ratio = f"{speed / median(peer, 'tokens_per_s'):.2f}" if peer else ""
            times = (f"{median(bursts, f):.3f}" for f in ("ttft_p50_s", "ttft_p99_s", "gap_p50_s", "gap_p99_s"))
            out.add_row("" if i else case, who, f"{speed:.1f}", ratio, *times, end_section=who == list(contenders)[-1])
    return out


def environment() -> dict[str, Any]:
    """Where the figures come from."""
    commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], text=True, cwd=ROOT)
    return {
        "machine": f"{platform.system()} {platform.machine()}, {platform.processor() or 'unknown processor'}",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("mlx", "mlx-lm", "celery", "redis", "gunicorn", "gevent")},
        "commit": commit.strip(),
    }


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="scripts/bench", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contender (default 3)")
    parser.add_argument("--model", type=Path, help="a model folder instead of SmolLM2 and the tiny one")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32], help="with --model")
    parser.add_argument("--tokens", type=int, default=48, help="with --model: tokens each")
    parser.add_argument("--who", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS), metavar="NAME")
    parser.add_argument("--only", choices=("load", "hop", "streams", "durability"), help="one of the parts")
    parser.add_argument("--json", type=Path, help="write everything measured there")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what was asked, print it, perhaps write it."""
    asked = arguments(sys.argv[1:] if argv is None else argv)
    console = Console(width=None if sys.stdout.isatty() else 140)
    cases = [Case(asked.model.resolve(), n, asked.tokens) for n in asked.clients] if asked.model else DEFAULT_CASES
    report: dict[str, Any] = environment()
    if asked.only in (None, "load"):
        results = measure(cases, asked.who, asked.rounds)
        console.print(table(results))
        report["load"] = {case: {who: [asdict(b) for b in bs] for who, bs in r.items()} for case, r in results.items()}
    if asked.only in (None, "hop"):
        report["queue_hop"] = queue_hop(cases[-1].model)
        console.print(
            "queue hop, accepted → in the engine, idle worker: p50 {p50_ms:.1f} ms, p99 {p99_ms:.1f} ms".format(
                **report["queue_hop"]
            )
        )
    if asked.only in (None, "streams"):
        report["idle_streams"] = idle_streams(500)
        console.print(
            "{streams} idle streams on one API process: {rss_mb:.0f} MB resident, {before_mb:.0f} MB before".format(
                **report["idle_streams"]
            )
        )
    if asked.only in (None, "durability"):
        costs = durability.durability(asked.rounds)
        console.print(durability.table(costs))
        report["durability"] = {way: {what: asdict(calls) for what, calls in c.items()} for way, c in costs.items()}
    if asked.json:
        asked.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
