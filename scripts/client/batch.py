"""Runs a file of prompts through the service: `scripts/batch prompts.jsonl -o results.jsonl`.

Each line of the file is the body of a `POST /v1/jobs`, with an `id` or `custom_id` if it is to have a name,
or only a string, the prompt. Each result is a line of the results file. Started again, the same command does
what is missing and sends nothing twice.

Exit status: 0 everything succeeded, 1 something failed or was malformed, 2 nothing was sent, 130 interrupted.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from threading import Event
from typing import NoReturn

from pydantic import ValidationError

from scripts.client import connection, plan
from scripts.client.api import Client, Refused, Unreachable
from scripts.client.progress import Display, Tally, say
from scripts.client.prompts import Malformed, Prompt, read_prompts
from scripts.client.results import NotOurs, Result, ResultFile, in_order
from scripts.client.retries import GaveUp, Patience
from scripts.client.runner import Pace, Runner
from shared.jobs.record import Priority
from shared.settings import Settings, load_settings

START_S = 5.0
"""Longest wait, before the first prompt, for a service that does not answer."""
BUFFERED = 4096
"""Results kept back at most, with --in-order, until the ones before them have come."""
WAIT_S = 30
"""The API is asked to hold an answer back for at most this long, until the job has ended."""

OK, FLAWED, NOT_STARTED, INTERRUPTED = 0, 1, 2, 130

DEFAULTS = ("model", "max_tokens", "temperature", "top_p", "seed", "priority")
"""Options that are fields of every request that does not have them itself."""

LIMITED = (
    "The API key's rate limit holds this up; `scripts/keys create NAME --rate-limit 10000/minute` makes a key "
    "with a higher one."
)


class CannotStart(Exception):
    """Nothing was sent; the message is the line that says why."""


class Batch:
    """One run of one file."""

    def __init__(self, options: argparse.Namespace, settings: Settings) -> None:
        self._options = options
        self._key = connection.api_key(options.api_key_env, settings)
        self._wait_s = int(min(WAIT_S, settings.max_wait_s))
        self._stop = Event()
        self._max_bytes = 0

    def run(self) -> int:
        """Do what is missing; returns the exit status."""
        options = self._options
        if not options.prompts.is_file():
            raise CannotStart(f"{options.prompts} is not a file")
        if options.output.exists() and not options.output.is_file():
            raise CannotStart(f"{options.output} is not a regular file: results are read again when a run is continued")
        self._max_bytes = options.prompts.stat().st_size
        try:
            with ResultFile(options.output) as results:
                tally = plan.survey(self._lines(), results.index, retry_failed=options.retry_failed, report=_report)
                return self._work(results, tally)
        except NotOurs as error:
            raise CannotStart(
                f"{options.output} {error}; continue it with the prompts and options it was made with, "
                "or name another file with -o"
            ) from error

    def _work(self, results: ResultFile, tally: Tally) -> int:
        """Send what is to be sent, write what comes."""
        try:
            if tally.done < tally.total:
                with Client(self._options.url, self._key, connections=self._options.concurrency) as client:
                    self._reach(client)
                    self._send(client, results, tally)
            results.tidy(in_order=self._options.in_order)
        except KeyboardInterrupt:
            say(f"interrupted: {tally}. Jobs already sent go on; the same command continues from here.")
            return INTERRUPTED
        except (GaveUp, Refused, OSError) as error:
            say(f"stopped: {error}. {tally}; the same command continues from here.")
            return FLAWED
        self._summarise(tally)
        return OK if tally.flawless else FLAWED

    def _reach(self, client: Client) -> None:
        """Be sure, before the first prompt, that the service is there and takes the key."""
        ask = partial(client.request, "GET", "/v1/jobs?limit=1")
        try:
            try:
                ask()
            except Unreachable:
                say(f"{self._options.url} does not answer yet; waiting for it")
                Patience(min(START_S, self._options.patience), self._stop).call(ask)
        except GaveUp as error:
            raise CannotStart(f"no service at {self._options.url}: {error}") from error
        except Refused as error:
            raise CannotStart(f"{self._options.url} refuses: {error}") from error

    def _send(self, client: Client, results: ResultFile, tally: Tally) -> None:
        options = self._options
        ahead = max(BUFFERED, options.concurrency) if options.in_order else 2 * options.concurrency
        with Display(tally) as display:
            patience = Patience(options.patience, self._stop, on_limited=lambda: display.note_once(LIMITED))
            pace = Pace(options.concurrency, ahead, self._wait_s)
            with Runner(client, patience, self._stop, pace) as runner:
                arriving = runner.run(plan.tasks(self._lines(), results, retry_failed=options.retry_failed))
                for result in in_order(arriving) if options.in_order else as_they_come(arriving):
                    results.append(result)
                    tally.add(result)
                    runner.taken()
                    display.refresh()

    def _lines(self) -> Iterator[Prompt | Malformed]:
        given = {name: getattr(self._options, name) for name in DEFAULTS}
        defaults = {name: value for name, value in given.items() if value is not None}
        return read_prompts(self._options.prompts, defaults, self._options.run, self._max_bytes)

    def _summarise(self, tally: Tally) -> None:
        say(f"{tally}, {tally.tokens} tokens; results in {self._options.output}")
        if tally.failed:
            say("The failed ones have their error beside them; --retry-failed tries them again.")
        if tally.malformed:
            say(f"Malformed lines skipped: {tally.malformed}.")


def as_they_come(arriving: Iterator[tuple[int, Result]]) -> Iterator[Result]:
    """Results without their places."""
    return (result for _, result in arriving)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        settings = load_settings()
        options = _parser(settings).parse_args(arguments)
        return Batch(options, settings).run()
    except ValidationError as error:
        say("settings that do not fit: " + ", ".join(str(fault["loc"][0]).upper() for fault in error.errors()))
    except (CannotStart, connection.NoKey, OSError) as error:
        say(f"batch: {error}")
    except KeyboardInterrupt:
        return INTERRUPTED
    return NOT_STARTED


def _parser(settings: Settings) -> argparse.ArgumentParser:
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        "scripts/batch",
        description=summary,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "prompts", type=Path, help="one request a line: the body of POST /v1/jobs, or a string as its prompt"
    )
    parser.add_argument("-o", "--output", type=Path, required=True, help="file with one result a line")
    connection.add_options(parser, settings)
    parser.add_argument("--concurrency", type=_positive, default=64, help="jobs at once (%(default)s)")
    parser.add_argument("--in-order", action="store_true", help="write results in the order of the prompts")
    parser.add_argument("--retry-failed", action="store_true", help="do again what failed in an earlier run")
    parser.add_argument("--run", default="", metavar="NAME", help="do a file again, as another run")
    parser.add_argument(
        "--patience",
        type=float,
        default=600.0,
        metavar="S",
        help="how long the service may be away",
    )
    fields = parser.add_argument_group("fields of every request that does not have them itself")
    fields.add_argument("--model")
    fields.add_argument("--max-tokens", type=_positive, metavar="N")
    fields.add_argument("--temperature", type=float, metavar="X")
    fields.add_argument("--top-p", type=float, metavar="X")
    fields.add_argument("--seed", type=int, metavar="N")
    fields.add_argument("--priority", choices=[each.label for each in Priority], default=Priority.BATCH.label)
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def _report(malformed: Malformed) -> None:
    say(f"line {malformed.line} {malformed.reason}; skipped")


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
