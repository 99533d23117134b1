"""The health checks of compose.yaml: `python -m scripts.stack.container_health web|mlx-server|flower`.

Exit 0: healthy. Else 1 and one line, which the engine keeps (`docker inspect`).
"""

from __future__ import annotations

import socket
import sys
import urllib.request
from collections.abc import Callable

TIMEOUT_S = 4.0
"""Less than the `timeout` of compose.yaml, so that the reason is told before the engine ends the check."""


class Unhealthy(Exception):
    """The line says why."""


def check_web() -> None:
    """The API answers. Its queue is the redis service's health, so that one failure has one name."""
    _get("http://127.0.0.1:8080/livez")


def check_flower() -> None:
    """Flower answers."""
    _get("http://127.0.0.1:5555/healthcheck")


def check_worker() -> None:
    """The worker of this container renews its lease and has its model loaded."""
    # The HTTP checks, which run in another image, do without these imports.
    from shared.models.registry import Registry
    from shared.queue.redis import connect
    from shared.settings import load_settings

    client = connect(load_settings().store_url, timeout_s=TIMEOUT_S, retries=0)
    here = [worker for worker in Registry(client).workers() if worker.host == socket.gethostname()]
    if not here:
        raise Unhealthy("this container's worker has not announced itself, or its lease has lapsed")
    # After a crash the one before may still be remembered for a moment.
    if max(here, key=lambda worker: worker.started_at).state == "loading":
        raise Unhealthy("the model is still loading")


CHECKS: dict[str, Callable[[], None]] = {"web": check_web, "mlx-server": check_worker, "flower": check_flower}


def _get(url: str) -> None:
    # No proxy: the environment's knows the way out of the container, not into it.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=TIMEOUT_S):
        pass


def main(service: str) -> int:
    """Run one service's check."""
    try:
        CHECKS[service]()
    except Exception as error:  # noqa: BLE001  whatever it is, it is the reason
        print(f"{type(error).__name__}: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
