"""Runs `main()` of a module; Ctrl-C never prints a traceback: `python -P -m scripts.lib.run MODULE ARGUMENTS…`.

The executables start this module with SIGINT ignored, because Python's own handler would print a traceback during
imports. While the module is imported, SIGINT ends the process; in `main()` it raises KeyboardInterrupt as usual.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys


def main() -> int | None:
    """Import the module and run its `main()`; return its exit status."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    del sys.argv[0]
    module = importlib.import_module(sys.argv[0])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        status: int | None = module.main()
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
        raise
    return status


if __name__ == "__main__":
    sys.exit(main())
