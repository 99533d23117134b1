"""`scripts/top`: a live view of workers, models, queues and running jobs."""

from __future__ import annotations

import argparse
import sys
import time
from typing import Final

from rich.console import Console
from rich.live import Live

from scripts.client.api import Client, ClientError, Refused, Unreachable
from scripts.client.cluster_state import History, State
from scripts.client.connection import NoKey, add_options, api_key
from scripts.client.top_view import screen
from shared.load_settings import load_settings
from shared.settings import Settings

ONCE_S: Final = 1.0
"""Time between the two readings of `--once`, over which it measures rates."""
WIDTH: Final = 160
"""Width of the page where there is no terminal."""


def _arguments(settings: Settings) -> argparse.Namespace:
    description = "Shows the workers, models, queues and running jobs of a service."
    parser = argparse.ArgumentParser(prog="scripts/top", description=description)
    add_options(parser, settings)
    parser.add_argument(
        "--every", type=_seconds, default=2.0, metavar="S", help="seconds between updates (%(default)s)"
    )
    parser.add_argument("--once", action="store_true", help="print one page as plain text and exit")
    return parser.parse_args()


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.1 <= seconds <= 3600:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0.1 to 3600")
    return seconds


def _once(client: Client, url: str) -> None:
    history = History()
    for pause_s in (0.0, ONCE_S):  # rates need two readings
        time.sleep(pause_s)
        history.add(State.read(client))
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    console.print(screen(history, url))


def _live(client: Client, url: str, every_s: float) -> None:
    """Draw until Ctrl-C. An outage is shown, and ends when the service is back; a refusal ends the command."""
    history = History()
    history.add(State.read(client))
    with Live(screen(history, url), screen=True, auto_refresh=False) as live:
        while True:
            time.sleep(every_s)  # the interval between two drawings
            try:
                history.add(State.read(client))
            except Unreachable as error:
                live.update(f"{url}: {error}\nTrying again …", refresh=True)
            else:
                live.update(screen(history, url), refresh=True)


def main() -> int:
    """Run the command; return the exit status."""
    settings = load_settings()
    options = _arguments(settings)
    try:
        key = api_key(options.api_key_env, settings)
        with Client(options.url, key) as client:
            if options.once:
                _once(client, options.url)
            else:
                _live(client, options.url, options.every)
    except NoKey as error:
        return _failed(str(error))
    except Refused as error:
        return _failed(f"{options.url} refuses: {error}")
    except ClientError as error:
        return _failed(f"{options.url}: {error}")
    except KeyboardInterrupt:
        return 0
    return 0


def _failed(reason: str) -> int:
    print(f"scripts/top: {reason}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
