"""Breaks a stack on purpose, and checks that no job notices: `scripts/chaos --seed 1 --minutes 30`.

Two workers, two API processes and a Valkey of their own run under a load of mixed jobs while a schedule drawn from the
seed kills, pauses, cuts off and fills up. Every job is held against the text of an undisturbed run.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.logging import RichHandler

from shared.models.folder import ModelError, check_folder
from shared.settings import ROOT
from tests.chaos import workspaces
from tests.chaos.checks import Ledger
from tests.chaos.clients import Clients
from tests.chaos.faults import Hand, Kind, schedule
from tests.chaos.fleet import Fleet, build
from tests.chaos.leaks import leaks
from tests.chaos.recovery import Recovery
from tests.chaos.report import Report
from tests.chaos.workload import prepare

INTERRUPTED = 130
_SLOTS = 32
_PACE = "!every=0.01 "
"""Order for the fake model: as many steps a second as a small model takes."""
_NO_DISK = "needs root on Linux, for a disk of its own"


def run(fleet: Fleet, asked: argparse.Namespace) -> Report:
    """Start the stack, break it for so long, let it come to rest, and judge."""
    fleet.start()
    requests = prepare(fleet.client, asked.seed, asked.requests, _PACE if asked.backend == "fake" else "")
    before = set(fleet.redis.scan_iter("mlxq:job:*"))
    for name in before:  # the undisturbed runs: not part of what is counted
        fleet.client.request("DELETE", f"/v1/jobs/{name.removeprefix('mlxq:job:')}")
    ledger, recovery = Ledger(), Recovery(fleet)
    hand = Hand(fleet, recovery)
    impossible = {Kind.DISK_FILLED: _NO_DISK} if fleet.disk is None else {}
    clients = Clients(fleet.client, requests, ledger, asked.seed, asked.clients)
    clients.start()
    try:
        hand.play(schedule(asked.seed, asked.minutes, [kind for kind in asked.only if kind not in impossible]))
        fleet.wait_whole()
    except BaseException:
        clients.abandon()
        raise
    clients.leave()
    recovery.wait()
    left = leaks(fleet, ledger)
    left += fleet.stop()
    return Report(asked.seed, asked.minutes, fleet.links[0].kind, hand.struck, ledger, recovery, left, impossible)


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="scripts/chaos",
        description=(__doc__ or "").split("\n\n")[0],
        epilog="Exit status: 0 when every promise was kept, 1 when one was broken, 130 when it was ended early. "
        "Full disks and network namespaces need root on Linux; elsewhere a proxy cuts workers off, and no disk fills.",
    )
    parser.add_argument("--seed", type=int, default=1, help="of the requests and of the schedule (default 1)")
    parser.add_argument(
        "--minutes",
        type=_above(float),
        default=5,
        help="how long things break (default 5); the whole takes a minute or two more",
    )
    parser.add_argument("--clients", type=_above(int), default=24, help="jobs under way at a time (default 24)")
    parser.add_argument("--requests", type=_above(int), default=60, help="different requests (default 60)")
    parser.add_argument(
        "--only",
        nargs="+",
        type=_kind,
        default=list(Kind),
        metavar="FAULT",
        help=f"some of the faults: {', '.join(map(_name, Kind))}",
    )
    parser.add_argument("--model", type=Path, default=ROOT / "models/tiny-random-llama", help="MLX model folder")
    parser.add_argument("--backend", choices=("auto", "fake"), default="auto", help="`fake`: made-up words, no model")
    parser.add_argument("--network", choices=("auto", "namespace", "proxy"), default="auto", help="how workers are cut")
    parser.add_argument("--json", type=Path, help="write everything measured there")
    parser.add_argument("--keep", action="store_true", help="keep the folder with all logs; kept anyway on a failure")
    asked = parser.parse_args(argv)
    try:
        if asked.backend != "fake":
            check_folder(asked.model)
    except ModelError as error:
        parser.error(str(error))
    return asked


def _above(number: Callable[[str], float]) -> Callable[[str], float]:
    """Read a number above 0."""

    def read(text: str) -> float:
        value = number(text)
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not above 0")
        return value

    return read


def _name(kind: Kind) -> str:
    return kind.name.lower().replace("_", "-")


def _kind(name: str) -> Kind:
    for kind in Kind:
        if _name(kind) == name:
            return kind
    raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(map(_name, Kind))}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print the table; 0 when every promise was kept, 1 when one was broken, 130 when it was ended early."""
    asked = arguments(sys.argv[1:] if argv is None else argv)
    errors = Console(stderr=True)
    logging.basicConfig(
        level=logging.INFO, format="%(message)s", handlers=[RichHandler(console=errors, show_path=False)]
    )
    for name in ("httpx2", "httpcore2"):
        logging.getLogger(name).setLevel(logging.WARNING)
    workspaces.sweep()
    home = workspaces.new(os.getpid())
    kept = False
    fleet: Fleet | None = None
    try:
        fleet = build(home, asked.model.resolve(), _SLOTS, asked.network, asked.backend)
        report = run(fleet, asked)
        report.show(Console(width=None if sys.stdout.isatty() else 140))
        if asked.json:
            asked.json.write_text(json.dumps(report.as_json(), indent=1) + "\n")
        kept = report.kept
    except KeyboardInterrupt:
        return INTERRUPTED
    finally:
        if fleet is not None:
            fleet.close()
        if kept and not asked.keep:
            shutil.rmtree(home)
        else:
            errors.print(f"logs: {home}")
    return 0 if kept else 1


if __name__ == "__main__":
    # Ended like this, too, it ends what it has started.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    raise SystemExit(main())
