"""The API server: `python -m web` runs gunicorn with the configuration in `gunicorn.conf.py`.

`load_or_exit` removes GUNICORN_CMD_ARGS from the environment, which would override the configuration file.
"""

from __future__ import annotations

import os
import sys

from gunicorn.app.wsgiapp import run  # type: ignore[import-untyped]

from shared.load_settings import load_or_exit
from shared.logging import configure
from shared.settings import ROOT


def main() -> None:
    """Check the settings, then run gunicorn in this process."""
    configure("web", "INFO")  # reading the settings can log
    load_or_exit()
    os.chdir(ROOT)
    sys.argv = ["gunicorn", "-c", str(ROOT / "web/gunicorn.conf.py"), "web.app:create_app()"]
    run()


if __name__ == "__main__":
    main()
