"""Injects faults into a stack and checks that no job is affected: `scripts/chaos --seed 1 --minutes 30`.

Two workers, two API processes and their own Valkey run a load of mixed jobs. Meanwhile processes are killed and paused,
connections are cut and the disk is filled, in an order drawn from the seed. Each job is compared with a run without
faults.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from shared.models.folder import ModelError, check_folder
from shared.settings import ROOT
from tests.chaos.checks import Outcomes
from tests.chaos.clients import Clients
from tests.chaos.command import run_in_workspace
from tests.chaos.faults import FaultInjector, FaultKind, schedule
from tests.chaos.leaks import find_leaks
from tests.chaos.recovery import Recovery
from tests.chaos.report import Report
from tests.chaos.stack import ChaosStack, build
from tests.chaos.workload import prepare_requests

_SLOTS = 32
_DIRECTIVES = "!every=0.01 "
"""Makes the fake model as slow as a small model."""
_NO_DISK = "needs root on Linux, to mount a disk"


def run(stack: ChaosStack, options: argparse.Namespace) -> Report:
    """Start the stack, inject faults, wait until it has recovered, and check the results."""
    stack.start()
    requests = prepare_requests(
        stack.client, options.seed, options.requests, _DIRECTIVES if options.backend == "fake" else ""
    )
    before = set(stack.redis.scan_iter("mlxq:job:*"))
    for name in before:  # the jobs of the reference runs must not be counted
        stack.client.request("DELETE", f"/v1/jobs/{name.removeprefix('mlxq:job:')}")
    outcomes, recovery = Outcomes(), Recovery(stack)
    injector = FaultInjector(stack, recovery)
    impossible = {FaultKind.DISK_FILLED: _NO_DISK} if stack.disk is None else {}
    clients = Clients(stack.client, requests, outcomes, options.seed, options.clients)
    clients.start()
    try:
        injector.run(schedule(options.seed, options.minutes, [kind for kind in options.only if kind not in impossible]))
        stack.wait_ready()
    except BaseException:
        clients.stop_submitting()
        raise
    clients.finish()
    recovery.wait()
    leaks = find_leaks(stack, outcomes)
    leaks += stack.stop()
    return Report(
        options.seed, options.minutes, stack.links[0].kind, injector.injected, outcomes, recovery, leaks, impossible
    )


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="scripts/chaos",
        description=(__doc__ or "").split("\n\n")[0],
        epilog="Exit status: 0 if all guarantees held, 1 if one was broken, 130 if the run was interrupted. "
        "Full disks and network namespaces need root on Linux; otherwise a proxy is used, and no disk is filled.",
    )
    parser.add_argument("--seed", type=int, default=1, help="seed of the requests and the schedule (default 1)")
    parser.add_argument(
        "--minutes",
        type=_positive(float),
        default=5,
        help="duration of the fault injection (default 5); the run takes one or two minutes more",
    )
    parser.add_argument("--clients", type=_positive(int), default=24, help="number of concurrent jobs (default 24)")
    parser.add_argument("--requests", type=_positive(int), default=60, help="number of different requests (default 60)")
    parser.add_argument(
        "--only",
        nargs="+",
        type=_kind,
        default=list(FaultKind),
        metavar="FAULT",
        help=f"inject only these faults: {', '.join(map(_name, FaultKind))}",
    )
    parser.add_argument("--model", type=Path, default=ROOT / "models/tiny-random-llama", help="MLX model folder")
    parser.add_argument(
        "--backend", choices=("auto", "fake"), default="auto", help="`fake`: random words without a model"
    )
    parser.add_argument(
        "--network", choices=("auto", "namespace", "proxy"), default="auto", help="how workers are cut off"
    )
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--keep", action="store_true", help="keep the folder with the logs, as after a failure")
    options = parser.parse_args(argv)
    try:
        if options.backend != "fake":
            check_folder(options.model)
    except ModelError as error:
        parser.error(str(error))
    return options


def _positive(number: Callable[[str], float]) -> Callable[[str], float]:
    """Return a parser of positive numbers."""

    def parse(text: str) -> float:
        value = number(text)
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not a positive number")
        return value

    return parse


def _name(kind: FaultKind) -> str:
    return kind.name.lower().replace("_", "-")


def _kind(name: str) -> FaultKind:
    for kind in FaultKind:
        if _name(kind) == name:
            return kind
    raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(map(_name, FaultKind))}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run and print the report; return the exit status."""
    options = arguments(sys.argv[1:] if argv is None else argv)

    def build_stack(home: Path) -> ChaosStack:
        return build(home, options.model.resolve(), _SLOTS, options.network, options.backend)

    def save(report: Report) -> None:
        if options.json:
            options.json.write_text(json.dumps(report.as_json(), indent=1) + "\n")

    return run_in_workspace(build_stack, lambda stack: run(stack, options), save, keep=options.keep)


if __name__ == "__main__":
    # SIGTERM acts like Ctrl-C, so that everything is cleaned up.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    raise SystemExit(main())
