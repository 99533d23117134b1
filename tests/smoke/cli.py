"""Checks a running service through its API and prints one line per check.

Exit status: 0 all checks passed, 1 a check failed, 2 the service cannot be reached.
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
from shared.load_settings import load_settings
from shared.settings import Settings
from tests.smoke import api, flower
from tests.smoke.probe import CheckFailed, Probe

T = TypeVar("T")
Check = Callable[[], None]

UNKNOWN_KEY = "mlxq_00000000_" + "0" * 43
"""A well-formed key that does not exist."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return the exit status."""
    try:
        settings = load_settings()
        options = _parser(settings).parse_args(arguments)
        key = connection.api_key(options.api_key_env, settings)
    except (ValidationError, connection.NoKey) as error:
        print(f"smoke: {error}", file=sys.stderr)
        return 2
    with (
        Client(options.url, key) as client,
        Client(options.url) as without_key,
        Client(options.url, UNKNOWN_KEY) as wrong_key,
    ):
        try:
            client.request("GET", "/livez")
        except Unreachable as error:
            print(f"smoke: no service at {options.url}: {error}", file=sys.stderr)
            return 2
        except Refused:
            pass  # the checks report why
        checks = dict(_named("", api.CHECKS, Probe(client, without_key, wrong_key)))
        if options.flower:
            checks |= _named("flower ", flower.CHECKS, _flower(options, settings))
        passed = [run(name, check) for name, check in checks.items()]
    print(f"{sum(passed)} of {len(passed)} checks passed")
    return 0 if all(passed) else 1


def run(name: str, check: Check) -> bool:
    """Run a check and print its line; return whether it passed."""
    started = time.perf_counter()
    failure = _failure(check)
    milliseconds = (time.perf_counter() - started) * 1000
    print(f"{'✗' if failure else '✓'} {name:<16} {milliseconds:7.0f} ms  {failure}".rstrip(), flush=True)
    return not failure


def _failure(check: Check) -> str:
    """Run a check; return why it failed, or an empty string."""
    try:
        check()
    except (CheckFailed, ClientError, httpx2.HTTPError) as error:
        return str(error) or type(error).__name__
    except (ValueError, KeyError, TypeError) as error:
        return f"the response has an unexpected form ({type(error).__name__})"
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
    parser.add_argument("--no-flower", dest="flower", action="store_false", help="do not check Flower")
    parser.add_argument(
        "--flower-url",
        metavar="URL",
        default=os.environ.get("FLOWER_URL") or connection.local_url(settings.flower_host, settings.flower_port),
        help="address of Flower (%(default)s); the login is FLOWER_USER and FLOWER_PASSWORD",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
