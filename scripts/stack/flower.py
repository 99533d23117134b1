"""Runs Flower with this project's settings: `python -m scripts.stack.flower`."""

from __future__ import annotations

import os
import sys

import celery.__main__
import flower.options  # noqa: F401 - defines the options that are set here
from tornado.options import options

from shared.settings import load_or_exit


def main() -> None:
    """Run Flower in this process.

    The password is set as an option, not in a variable or an argument: Flower splits variables at commas, and every
    user of the machine can read command lines.
    """
    settings = load_or_exit()
    password = settings.flower_password.get_secret_value()
    if not password:
        sys.exit("FLOWER_PASSWORD is empty: set it in the environment or .env")
    options.basic_auth = [f"{settings.flower_user}:{password}"]
    no_file = f"--conf={os.devnull}"  # otherwise Flower executes flowerconfig.py from the current directory
    address = (f"--address={settings.flower_host}", f"--port={settings.flower_port}")
    sys.argv = ["celery", "-A", "shared.queue.wakeups:app", "flower", no_file, *address]
    celery.__main__.main()


if __name__ == "__main__":
    main()
