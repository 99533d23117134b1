"""The health checks of compose.yaml: `python -m scripts.stack.container_health web|background|mlx-server|flower`.

Exit status 0: healthy; 1: unhealthy, with the reason on stdout, which `docker inspect` shows.
"""

from __future__ import annotations

import socket
import sys
import urllib.request
from collections.abc import Callable

TIMEOUT_S = 4.0
"""Below the `timeout` in compose.yaml, so that the reason is printed before the engine ends the check."""


class Unhealthy(Exception):
    """The message is the reason."""


def check_web() -> None:
    """Check that the API answers. Redis is not checked here: it has its own health check."""
    _get("http://127.0.0.1:8080/livez")


def check_flower() -> None:
    """Check that Flower answers."""
    _get("http://127.0.0.1:5555/healthcheck")


def check_worker() -> None:
    """Check that this container's worker renews its lease and has loaded its model."""
    # Imported here to keep the HTTP checks fast.
    from shared.load_settings import load_settings
    from shared.models.registry import Registry
    from shared.redis.client import connect

    client = connect(load_settings().store_url, timeout_s=TIMEOUT_S, retries=0)
    here = [worker for worker in Registry(client).workers() if worker.host == socket.gethostname()]
    if not here:
        raise Unhealthy("this container's worker has not registered, or its lease has expired")
    # After a crash, the previous worker is listed until its entry expires.
    if max(here, key=lambda worker: worker.started_at).state == "loading":
        raise Unhealthy("the model is still loading")


def check_background() -> None:
    """Check that a background process leads. Others wait until it ends."""
    from shared.load_settings import load_settings
    from shared.redis import keys
    from shared.redis.client import connect

    if not connect(load_settings().store_url, timeout_s=TIMEOUT_S, retries=0).exists(keys.LEADER):
        raise Unhealthy("no background process leads")


CHECKS: dict[str, Callable[[], None]] = {
    "web": check_web,
    "background": check_background,
    "mlx-server": check_worker,
    "flower": check_flower,
}


def _get(url: str) -> None:
    # Ignore proxies from the environment: the service is in this container.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=TIMEOUT_S):
        pass


def main(service: str) -> int:
    """Run the check of a service; return the exit status."""
    try:
        CHECKS[service]()
    except Exception as error:  # noqa: BLE001 - any error means unhealthy
        print(f"{type(error).__name__}: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
