"""Celery's part of the worker process: wake-ups, remote control and heartbeats. It runs no tasks.

Flower and `celery inspect` show the process as a Celery node. Jobs appear as tasks through the events of
`shared.queue.task_events`.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable
from typing import Any, Final

from celery import Celery, bootsteps
from celery.apps.worker import Worker
from celery.exceptions import CPendingDeprecationWarning, SecurityWarning
from celery.signals import setup_logging
from celery.worker import WorkController, state
from celery.worker.consumer import Consumer as BrokerConsumer
from kombu import Connection
from kombu import Consumer as KombuConsumer
from redis import ResponseError

from shared.queue.wakeups import wakeup_queue

# Celery warns root about pickled messages; ours are JSON.
warnings.filterwarnings("ignore", category=SecurityWarning)
# Celery warns about running tasks when a connection is lost; there are none.
warnings.filterwarnings("ignore", category=CPendingDeprecationWarning)

RECONNECT_S: Final = 0.5
"""Time between two tries to reach the broker."""
REFUSED_PAUSE_S: Final = 2.0
"""Pause after the broker answered with an error. A broker without memory does so for a while."""
_LOG_EVERY_S: Final = 60.0

OnWakeup = Callable[[str], object]
"""Called with the model that has waiting jobs."""


class RetryingConsumer(BrokerConsumer):
    """Celery's consumer, with a constant short pause between connection attempts.

    Celery's own consumer backs off to one attempt every 30 seconds.
    """

    def on_connection_error_after_connected(self, exc: Exception) -> None:
        """Reconnect after the connection was lost."""
        super().on_connection_error_after_connected(exc)
        _pause_when_refused(exc)

    def on_connection_error_before_connected(self, exc: Exception) -> None:
        """Retry the first connection."""
        super().on_connection_error_before_connected(exc)
        _pause_when_refused(exc)

    def ensure_connected(self, conn: Any) -> Connection:  # Any: its stubs take whole seconds only
        """Connect; log failures at most once a minute."""
        ensure: Callable[..., Connection] = conn.ensure_connection
        logged_at = -_LOG_EVERY_S

        def ensure_connection(log: Callable[[Exception, float], object], *args: Any, **kwargs: Any) -> Connection:
            def log_rarely(error: Exception, interval: float) -> None:
                nonlocal logged_at
                if time.monotonic() - logged_at >= _LOG_EVERY_S:
                    logged_at = time.monotonic()
                    log(error, interval)

            pauses = {"interval_start": RECONNECT_S, "interval_step": 0, "interval_max": RECONNECT_S}
            return ensure(log_rarely, *args, **pauses, **kwargs)

        conn.ensure_connection = ensure_connection
        connected: Connection = super().ensure_connected(conn)
        return connected


def _pause_when_refused(error: Exception) -> None:
    if isinstance(error, ResponseError):
        time.sleep(REFUSED_PAUSE_S)


def _wakeup_step(node: str, on_wakeup: OnWakeup) -> type[bootsteps.ConsumerStep]:
    """Return a class that Celery instantiates: a step that consumes wake-ups on Celery's own connection."""

    def receive(body: Any, _message: Any) -> None:
        if isinstance(body, dict) and isinstance(model := body.get("model"), str):
            on_wakeup(model)

    class Wakeups(bootsteps.ConsumerStep):
        """Receives wake-ups."""

        def get_consumers(self, channel: Any) -> list[KombuConsumer]:
            """Return the consumer of this process's queue."""
            return [
                KombuConsumer(channel, queues=[wakeup_queue(node)], callbacks=[receive], accept=["json"], no_ack=True)
            ]

        def stop(self, parent: Any) -> None:
            """Cancel the consumer, unless its connection is lost."""
            if parent.connection is not None:
                super().stop(parent)

        def shutdown(self, parent: Any) -> None:
            """Close the channel, unless its connection is lost."""
            if parent.connection is not None:
                super().shutdown(parent)

    return Wakeups


class Consumer(Worker):
    """A Celery worker without tasks that leaves signals to `worker.app`.

    Celery's own signal handlers print lines that are not JSON, exit with a failure status on SIGINT, and have a cold
    shutdown that does not wait until jobs are handed back.

    Args:
        node: the process's name.
        on_connected: called after each connection to the broker.
    """

    def __init__(self, app: Celery, node: str, on_wakeup: OnWakeup, on_connected: Callable[[], object]) -> None:
        self._on_connected = on_connected
        app.steps["consumer"].add(_wakeup_step(node, on_wakeup))
        super().__init__(
            app=app,
            hostname=node,
            consumer_cls=RetryingConsumer,
            pool="solo",
            exclude_queues=[app.conf.task_default_queue],
            task_events=True,
            without_gossip=True,
            without_mingle=True,
            quiet=True,
        )

    @property
    def status(self) -> int:
        """Exit status, once it has ended."""
        return int(self.exitcode or os.EX_OK)

    def install_platform_tweaks(self, worker: WorkController) -> None:
        """Install no signal handlers."""

    def on_consumer_ready(self, consumer: Any) -> None:
        """Called by Celery after each connection."""
        super().on_consumer_ready(consumer)
        self._on_connected()


def stop_consuming() -> None:
    """Make `Consumer.start` return. Safe in a signal handler."""
    state.should_stop = os.EX_OK  # type: ignore[assignment]  # the stubs know only its default


@setup_logging.connect
def _keep_our_logging(**_: object) -> None:
    """Celery configures logging unless a receiver is connected to this signal."""
