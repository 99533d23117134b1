"""Finds Chromium, or installs it: `python -m tests.browser.chromium`."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Final

from scripts.lib import apt

_NAMES: Final = ("chromium", "chromium-browser", "google-chrome")
_MAC: Final = Path("/Applications/Google Chrome.app/Contents/MacOS/Google Chrome")


def find() -> str | None:
    """Return the path of Chromium: the variable CHROMIUM, a command, or Chrome on a Mac."""
    found = (shutil.which(name) for name in (os.environ.get("CHROMIUM", ""), *_NAMES) if name)
    return next((path for path in found if path), str(_MAC) if _MAC.exists() else None)


def main() -> None:
    """Install Chromium if it is missing and that is possible."""
    if find() is None and apt.can_install():
        print("installing chromium: the tests of the console need it")
        apt.install("chromium")
    if find() is None:
        print("no Chromium found: install it or set CHROMIUM to its path. Without it the tests of the console fail")


if __name__ == "__main__":
    main()
