"""Celery's part of the worker process: wake-ups, remote control, heartbeats. It runs no tasks.

Flower and `celery inspect` see the process as a Celery node; jobs appear there as tasks by the events of
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
"""Between two tries to reach a broker that is away."""
REFUSED_PAUSE_S: Final = 2.0
"""Before another try with a broker that answers but refuses: one without memory stays so for a while."""
_LOG_AGAIN_S: Final = 60.0

OnWakeup = Callable[[str], object]
"""Called with the model that has work."""


class PatientConsumer(BrokerConsumer):
    """Celery's consumer, which keeps trying to reach a broker that is away or refuses.

    Celery itself backs off to a try every half minute.
    """

    def on_connection_error_after_connected(self, exc: Exception) -> None:
        """Connect anew."""
        super().on_connection_error_after_connected(exc)
        _pause_when_refused(exc)

    def on_connection_error_before_connected(self, exc: Exception) -> None:
        """Try again to connect."""
        super().on_connection_error_before_connected(exc)
        _pause_when_refused(exc)

    def ensure_connected(self, conn: Any) -> Connection:  # Any: its stubs take whole seconds only
        """Connect; failures are logged at most once a minute."""
        ensure: Callable[..., Connection] = conn.ensure_connection
        logged_at = -_LOG_AGAIN_S

        def ensure_patiently(log: Callable[[Exception, float], object], *args: Any, **kwargs: Any) -> Connection:
            def log_rarely(error: Exception, interval: float) -> None:
                nonlocal logged_at
                if time.monotonic() - logged_at >= _LOG_AGAIN_S:
                    logged_at = time.monotonic()
                    log(error, interval)

            pauses = {"interval_start": RECONNECT_S, "interval_step": 0, "interval_max": RECONNECT_S}
            return ensure(log_rarely, *args, **pauses, **kwargs)

        conn.ensure_connection = ensure_patiently
        connected: Connection = super().ensure_connected(conn)
        return connected


def _pause_when_refused(error: Exception) -> None:
    if isinstance(error, ResponseError):
        time.sleep(REFUSED_PAUSE_S)


def _wakeup_step(node: str, on_wakeup: OnWakeup) -> type[bootsteps.ConsumerStep]:
    """A consumer on Celery's own connection: Celery takes a class and instantiates it."""

    def receive(body: Any, _message: Any) -> None:
        if isinstance(body, dict) and isinstance(model := body.get("model"), str):
            on_wakeup(model)

    class Wakeups(bootsteps.ConsumerStep):
        """Receives wake-ups."""

        def get_consumers(self, channel: Any) -> list[KombuConsumer]:
            """The consumer of this process's queue."""
            return [
                KombuConsumer(channel, queues=[wakeup_queue(node)], callbacks=[receive], accept=["json"], no_ack=True)
            ]

        def stop(self, parent: Any) -> None:
            """Cancel the consumer, if there is still a connection to cancel it on."""
            if parent.connection is not None:
                super().stop(parent)

        def shutdown(self, parent: Any) -> None:
            """Close its channel, if there is still a connection."""
            if parent.connection is not None:
                super().shutdown(parent)

    return Wakeups


class Consumer(Worker):
    """A Celery worker without tasks, which leaves signals to `worker.app`.

    Celery's own signal handlers print lines that are not JSON, exit with a failure status on SIGINT, and have a cold
    shutdown that does not wait until jobs are handed back.
    """

    def __init__(self, app: Celery, node: str, on_wakeup: OnWakeup, on_connected: Callable[[], object]) -> None:
        self._on_connected = on_connected
        app.steps["consumer"].add(_wakeup_step(node, on_wakeup))
        super().__init__(
            app=app,
            hostname=node,
            consumer_cls=PatientConsumer,
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
        """Celery is connected; called again after each reconnection."""
        super().on_consumer_ready(consumer)
        self._on_connected()


def stop_consuming() -> None:
    """Make `Consumer.start` return. May be called in a signal handler."""
    state.should_stop = os.EX_OK  # type: ignore[assignment]  # the stubs know only its default


@setup_logging.connect
def _keep_our_logging(**_: object) -> None:
    """Celery configures logging unless a receiver is connected to this signal."""
