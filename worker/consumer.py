"""Celery's part of the worker process: the consumer of tickets, with our signals and our logging."""

from __future__ import annotations

import hashlib
import logging
import os
import socket
import time
import warnings
from collections.abc import Callable
from typing import Any, Final

from celery import Celery
from celery.apps.worker import Worker
from celery.exceptions import CPendingDeprecationWarning, SecurityWarning
from celery.signals import setup_logging
from celery.worker import WorkController, state
from celery.worker.consumer import Consumer as BrokerConsumer
from kombu import Connection
from redis import ResponseError

from shared.settings import Settings
from shared.tickets import own_queue, queue_name

# It warns root of what pickled messages can do; ours are JSON.
warnings.filterwarnings("ignore", category=SecurityWarning)
# Whenever a connection is lost it says that tasks run on, which is what they are to do.
warnings.filterwarnings("ignore", category=CPendingDeprecationWarning)

RECONNECT_S: Final = 0.5
"""Between two tries to reach a broker that is away."""
REFUSED_PAUSE_S: Final = 2.0
"""Before another try with a broker that answers but refuses: one without memory stays so for a while."""
_TELL_AGAIN_S: Final = 60.0


class TicketConsumer(BrokerConsumer):
    """Celery's consumer, patient with a broker that is away or refuses.

    Celery itself would look for one that is away less and less often, in the end every half minute: so long would jobs
    wait for it to notice.
    """

    def on_connection_error_after_connected(self, exc: Exception) -> None:
        """Connect anew."""
        super().on_connection_error_after_connected(exc)
        if isinstance(exc, ResponseError):
            time.sleep(REFUSED_PAUSE_S)

    def ensure_connected(self, conn: Any) -> Connection:  # Any: its stubs take whole seconds only
        """The connection, once it stands; that it does not is told once a minute."""
        ensure: Callable[..., Connection] = conn.ensure_connection
        told_at = -_TELL_AGAIN_S

        def look(tell: Callable[[Exception, float], object], *args: Any, **kwargs: Any) -> Connection:
            def tell_rarely(error: Exception, interval: float) -> None:
                nonlocal told_at
                if time.monotonic() - told_at >= _TELL_AGAIN_S:
                    told_at = time.monotonic()
                    tell(error, interval)

            pauses = {"interval_start": RECONNECT_S, "interval_step": 0, "interval_max": RECONNECT_S}
            return ensure(tell_rarely, *args, **pauses, **kwargs)

        conn.ensure_connection = look
        connected: Connection = super().ensure_connected(conn)
        return connected


class Consumer(Worker):
    """A Celery worker with a thread for each slot, which leaves signals to `worker.app`.

    Celery's own handlers print what is no JSON, give SIGINT an exit status of failure, and know a cold shutdown that
    would not wait for jobs to be handed back.
    """

    def __init__(self, app: Celery, settings: Settings, node: str, on_ready: Callable[[], object]) -> None:
        self._tell_ready = on_ready
        own = own_queue(settings.model_id, node)
        app.amqp.queues.add(own)
        super().__init__(
            app=app,
            hostname=node,
            consumer_cls=TicketConsumer,
            pool="threads",
            concurrency=settings.slots,
            queues=[queue_name(settings.model_id), own.name],
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
        """Celery consumes."""
        super().on_consumer_ready(consumer)
        self._tell_ready()


def stop_consuming() -> None:
    """Make `Consumer.start` return once its tasks have ended. May be called in a signal handler."""
    state.should_stop = os.EX_OK  # type: ignore[assignment]  # the stubs know only its default


def node_name(settings: Settings, index: int) -> str:
    """The Celery node name: the same after a restart, another for each data folder and worker of a machine."""
    stack = hashlib.sha256(str(settings.data_dir).encode()).hexdigest()[:6]
    return f"mlxq-{index}-{stack}@{socket.gethostname()}"


@setup_logging.connect
def _keep_our_logging(**_: object) -> None:
    """Celery sets logging up unless somebody listens to this signal."""
    # It says of each ticket that it came and went; the job's own line, with its ids, says more.
    for name in ("celery.worker.strategy", "celery.app.trace"):
        logging.getLogger(name).setLevel(logging.WARNING)
