"""The API server: `python -m web` becomes gunicorn with our configuration.

gunicorn reads GUNICORN_CMD_ARGS before its configuration file, and lets it win. So the variable is removed first.
"""

from __future__ import annotations

import os
import sys

from shared.settings import ROOT, load_or_exit


def main() -> None:
    """Check the settings, then replace this process with gunicorn."""
    load_or_exit()
    os.chdir(ROOT)
    os.execv(
        sys.executable,
        [sys.executable, "-P", "-m", "gunicorn", "-c", str(ROOT / "web/gunicorn.conf.py"), "web.app:create_app()"],
    )


if __name__ == "__main__":
    main()
