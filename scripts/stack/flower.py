"""Flower, with our settings: `python -m scripts.stack.flower`."""

from __future__ import annotations

import os
import sys

from shared.settings import load_or_exit


def main() -> None:
    """Become Flower. The password travels in the environment: a command line is seen by every user."""
    settings = load_or_exit()
    password = settings.flower_password.get_secret_value()
    if not password:
        sys.exit("FLOWER_PASSWORD is empty: set it in the environment or .env")
    environment = {**os.environ, "FLOWER_BASIC_AUTH": f"{settings.flower_user}:{password}"}
    address = (f"--address={settings.host}", f"--port={settings.flower_port}")
    command = [sys.executable, "-m", "celery", "-A", "shared.queue.wakeups:app", "flower", *address]
    os.execve(sys.executable, command, environment)


if __name__ == "__main__":
    main()
