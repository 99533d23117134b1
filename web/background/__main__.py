"""Start a background process: `python -m web.background`."""

from __future__ import annotations

from gevent import monkey

monkey.patch_all()

from shared.runtime import freeze_garbage_collector, pause_garbage_collector  # noqa: E402

pause_garbage_collector()

import signal  # noqa: E402

import gevent  # noqa: E402

from shared.load_settings import load_or_exit  # noqa: E402
from shared.logging import configure  # noqa: E402
from web.background.process import Background  # noqa: E402
from web.services import build  # noqa: E402


def main() -> None:
    """Run until SIGTERM or SIGINT."""
    configure("background", "INFO")  # reading the settings can log
    settings = load_or_exit()
    configure("background", settings.log_level)
    services = build(settings, process="background")
    background = Background(services)
    for number in (signal.SIGTERM, signal.SIGINT):
        gevent.signal_handler(number, background.stop)
    freeze_garbage_collector()
    background.run()
    if services.tracer is not None:
        services.tracer.close()


if __name__ == "__main__":
    main()
