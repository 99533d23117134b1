"""Runs a file of prompts through the service: `scripts/batch prompts.jsonl -o results.jsonl`.

Each line of the prompts file is the body of a `POST /v1/jobs`, optionally with an `id` or `custom_id`, or a
string, which is the prompt, or a request in the format of OpenAI's batches. Each line of the results file is one
result. The same command continues an interrupted run; no prompt is sent twice.

Exit status: 0 all succeeded, 1 a prompt failed or was malformed, 2 nothing was sent, 130 interrupted.
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
from scripts.client.progress import Display, Tally, print_line
from scripts.client.prompts import Malformed, Prompt, read_prompts
from scripts.client.results import Result, ResultFile, ResultsMismatch, in_order
from scripts.client.retries import RetriesExhausted, RetryPolicy
from scripts.client.runner import Limits, Runner
from shared.jobs.record import Priority
from shared.load_settings import load_settings
from shared.settings import Settings

START_TIMEOUT_S = 5.0
"""Maximum wait for the service before the first prompt."""
MAX_BUFFERED = 4096
"""Maximum number of results that --in-order holds back until earlier ones arrive."""
WAIT_S = 30
"""Maximum duration of a long poll for the end of a job."""

OK, FAILED, NOT_STARTED, INTERRUPTED = 0, 1, 2, 130

DEFAULTS = ("model", "max_tokens", "temperature", "top_p", "seed", "priority")
"""Options that set fields of all requests without these fields."""

RATE_LIMITED = (
    "The API key's rate limit slows this down; `scripts/keys create NAME --rate-limit 10000/minute` creates a key "
    "with a higher limit."
)


class CannotStart(Exception):
    """Nothing was sent. The message is one line that says why."""


class Batch:
    """One run of a prompts file."""

    def __init__(self, options: argparse.Namespace, settings: Settings) -> None:
        self._options = options
        self._key = connection.api_key(options.api_key_env, settings)
        self._wait_s = int(min(WAIT_S, settings.max_wait_s))
        self._stop = Event()
        self._max_bytes = 0

    def run(self) -> int:
        """Process the prompts without a result; return the exit status."""
        options = self._options
        if not options.prompts.is_file():
            raise CannotStart(f"{options.prompts} is not a file")
        if options.output.exists() and not options.output.is_file():
            raise CannotStart(f"{options.output} is not a regular file: a continued run must read its results")
        self._max_bytes = options.prompts.stat().st_size
        try:
            with ResultFile(options.output) as results:
                tally = plan.scan(self._lines(), results.index, retry_failed=options.retry_failed, report=_report)
                return self._work(results, tally)
        except ResultsMismatch as error:
            raise CannotStart(
                f"{options.output} {error}; use the same prompts and options as before, or another file with -o"
            ) from error

    def _work(self, results: ResultFile, tally: Tally) -> int:
        """Send the prompts without a result and write the results."""
        try:
            if tally.done < tally.total:
                with Client(self._options.url, self._key, connections=self._options.concurrency) as client:
                    self._check_service(client)
                    self._send(client, results, tally)
            results.compact(in_order=self._options.in_order)
        except KeyboardInterrupt:
            print_line(f"interrupted: {tally}. Jobs already sent continue; run the same command again to continue.")
            return INTERRUPTED
        except (RetriesExhausted, Refused, OSError) as error:
            print_line(f"stopped: {error}. {tally}; run the same command again to continue.")
            return FAILED
        self._summarise(tally)
        return OK if tally.all_succeeded else FAILED

    def _check_service(self, client: Client) -> None:
        """Check that the service answers and accepts the key."""
        probe = partial(client.request, "GET", "/v1/jobs?limit=1")
        try:
            try:
                probe()
            except Unreachable:
                print_line(f"{self._options.url} does not answer yet; waiting for it")
                RetryPolicy(min(START_TIMEOUT_S, self._options.max_outage), self._stop).call(probe)
        except RetriesExhausted as error:
            raise CannotStart(f"no service at {self._options.url}: {error}") from error
        except Refused as error:
            raise CannotStart(f"{self._options.url} rejects the request: {error}") from error

    def _send(self, client: Client, results: ResultFile, tally: Tally) -> None:
        options = self._options
        max_ahead = max(MAX_BUFFERED, options.concurrency) if options.in_order else 2 * options.concurrency
        with Display(tally) as display:
            retries = RetryPolicy(
                options.max_outage, self._stop, on_rate_limited=lambda: display.note_once(RATE_LIMITED)
            )
            limits = Limits(options.concurrency, max_ahead, self._wait_s)
            with Runner(client, retries, self._stop, limits) as runner:
                completed = runner.run(plan.tasks(self._lines(), results, retry_failed=options.retry_failed))
                for result in in_order(completed) if options.in_order else without_index(completed):
                    results.append(result)
                    tally.add(result)
                    runner.result_written()
                    display.refresh()

    def _lines(self) -> Iterator[Prompt | Malformed]:
        given = {name: getattr(self._options, name) for name in DEFAULTS}
        defaults = {name: value for name, value in given.items() if value is not None}
        return read_prompts(self._options.prompts, defaults, self._options.run, self._max_bytes)

    def _summarise(self, tally: Tally) -> None:
        print_line(f"{tally}, {tally.tokens} tokens; results in {self._options.output}")
        if tally.failed:
            print_line("Their errors are in the results file; --retry-failed runs them again.")
        if tally.malformed:
            print_line(f"Malformed lines skipped: {tally.malformed}.")


def without_index(completed: Iterator[tuple[int, Result]]) -> Iterator[Result]:
    """Generate results in the order of their completion."""
    return (result for _, result in completed)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return the exit status."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        settings = load_settings()
        options = _parser(settings).parse_args(arguments)
        return Batch(options, settings).run()
    except ValidationError as error:
        print_line("batch: invalid settings: " + ", ".join(str(fault["loc"][0]).upper() for fault in error.errors()))
    except (CannotStart, connection.NoKey, OSError) as error:
        print_line(f"batch: {error}")
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
        "prompts", type=Path, help="one request per line: the body of POST /v1/jobs, or a string with the prompt"
    )
    parser.add_argument("-o", "--output", type=Path, required=True, help="file for the results, one per line")
    connection.add_options(parser, settings)
    parser.add_argument(
        "--concurrency", type=_positive, default=64, help="maximum number of concurrent jobs (%(default)s)"
    )
    parser.add_argument("--in-order", action="store_true", help="write results in the order of the prompts")
    parser.add_argument(
        "--retry-failed", action="store_true", help="run the prompts again that failed in an earlier run"
    )
    parser.add_argument("--run", default="", metavar="NAME", help="run a file again under another name")
    parser.add_argument(
        "--max-outage",
        type=float,
        default=600.0,
        metavar="S",
        help="stop when the service has been unreachable for this time in seconds (%(default)g)",
    )
    # The option's earlier name.
    parser.add_argument("--patience", dest="max_outage", type=float, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    fields = parser.add_argument_group("fields of requests that do not set them")
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
        raise argparse.ArgumentTypeError("must be 1 or more")
    return number


def _report(malformed: Malformed) -> None:
    print_line(f"line {malformed.line} {malformed.reason}; skipped")


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
