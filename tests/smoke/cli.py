"""Checks a running service from outside, a line a check.

Exit status: 0 all is well, 1 something is not, 2 the checks cannot be made.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TypeVar

import httpx2
from pydantic import ValidationError

from scripts.client import connection
from scripts.client.api import Client, ClientError, Refused, Unreachable
from shared.settings import Settings, load_settings
from tests.smoke import api, flower
from tests.smoke.probe import Probe, Wrong

T = TypeVar("T")
Check = Callable[[], None]

IMPOSTOR = "mlxq_00000000_" + "0" * 43
"""Formed like a key, but nobody's."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    try:
        settings = load_settings()
        options = _parser(settings).parse_args(arguments)
        key = connection.api_key(options.api_key_env, settings)
    except (ValidationError, connection.NoKey) as error:
        print(f"smoke: {error}", file=sys.stderr)
        return 2
    with Client(options.url, key) as client, Client(options.url) as stranger, Client(options.url, IMPOSTOR) as impostor:
        try:
            client.request("GET", "/livez")
        except Unreachable as error:
            print(f"smoke: no service at {options.url}: {error}", file=sys.stderr)
            return 2
        except Refused:
            pass  # the checks say what is wrong
        checks = dict(_named("", api.CHECKS, Probe(client, stranger, impostor)))
        if options.flower:
            checks |= _named("flower ", flower.CHECKS, _flower(options, settings))
        passed = [run(name, check) for name, check in checks.items()]
    print(f"{sum(passed)} of {len(passed)} checks passed")
    return 0 if all(passed) else 1


def run(name: str, check: Check) -> bool:
    """Make one check and print its line; returns whether it passed."""
    began = time.perf_counter()
    wrong = _wrong(check)
    milliseconds = (time.perf_counter() - began) * 1000
    print(f"{'✗' if wrong else '✓'} {name:<16} {milliseconds:7.0f} ms  {wrong}".rstrip(), flush=True)
    return not wrong


def _wrong(check: Check) -> str:
    """What is wrong; empty when nothing is."""
    try:
        check()
    except (Wrong, ClientError, httpx2.HTTPError) as error:
        return str(error) or type(error).__name__
    except (ValueError, KeyError, TypeError) as error:
        return f"the answer is of an unexpected form ({type(error).__name__})"
    return ""


def _named(prefix: str, checks: Iterable[Callable[[T], None]], subject: T) -> Iterator[tuple[str, Check]]:
    for check in checks:
        yield prefix + check.__name__.strip("_").replace("_", " "), partial(check, subject)


def _flower(options: argparse.Namespace, settings: Settings) -> flower.Flower:
    password = settings.flower_password.get_secret_value()
    return flower.Flower(options.flower_url.rstrip("/"), settings.flower_user, password)


def _parser(settings: Settings) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "scripts/smoke", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    connection.add_options(parser, settings)
    parser.add_argument("--no-flower", dest="flower", action="store_false", help="leave Flower out")
    parser.add_argument(
        "--flower-url",
        metavar="URL",
        default=os.environ.get("FLOWER_URL") or connection.local_url(settings.flower_host, settings.flower_port),
        help="where Flower is (%(default)s); it is entered with FLOWER_USER and FLOWER_PASSWORD",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
