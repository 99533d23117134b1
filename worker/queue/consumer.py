"""Celery's part of the worker process: the consumer of tickets, with our signals and our logging."""

from __future__ import annotations

import hashlib
import logging
import os
import socket
import time
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from celery import Celery
from celery.apps.worker import Worker
from celery.exceptions import CPendingDeprecationWarning, SecurityWarning
from celery.signals import setup_logging
from celery.worker import WorkController, state
from celery.worker.consumer import Consumer as BrokerConsumer
from kombu import Connection, Queue
from redis import ResponseError

from shared.queue.wakeups import PREFIX
from shared.settings import Settings

# It warns root of what pickled messages can do; ours are JSON.
warnings.filterwarnings("ignore", category=SecurityWarning)
# Whenever a connection is lost it says that tasks run on, which is what they are to do.
warnings.filterwarnings("ignore", category=CPendingDeprecationWarning)

LOOK_AGAIN_S: Final = 0.25
"""Between two looks at which models are warm."""
ASK_AGAIN_S: Final = 0.05
"""Longest wait for tickets of some models while others are full, which may have a free slot at any moment."""
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


@dataclass(frozen=True, slots=True)
class WarmModel:
    """A model whose tickets are taken: its queues, and how many at a time."""

    queues: tuple[str | Queue, ...]
    slots: int


class OpenQueues:
    """The order in which kombu asks for tickets, without the queues of models that have no slot free.

    Celery only knows whether a thread of the pool is free. A ticket that was taken for a full model would be lost to
    the workers that have a slot for it.

    Args:
        channel: kombu's, whose order this takes over.
        closed: the queues to leave out now.
    """

    def __init__(self, channel: Any, closed: Callable[[], Collection[str]]) -> None:
        self._channel = channel
        self._usual_s: float = channel.brpop_timeout
        # kombu makes it of a class that is named in the options, and tells that class nothing.
        self._order, channel._queue_cycle = channel._queue_cycle, self  # noqa: SLF001
        self._closed = closed
        self.update, self.rotate = self._order.update, self._order.rotate

    def consume(self, n: int) -> list[str]:
        """The queues to ask now."""
        asked, closed = self._order.consume(n), self._closed()
        found = [name for name in asked if name not in closed]
        self._channel.brpop_timeout = self._usual_s if len(found) == len(asked) else ASK_AGAIN_S
        return found


class Consumer(Worker):
    """A Celery worker with a thread for each slot, which leaves signals to `worker.app`.

    Args:
        warm: the models that are; asked again and again.

    Celery's own handlers print what is no JSON, give SIGINT an exit status of failure, and know a cold shutdown that
    would not wait for jobs to be handed back.
    """

    def __init__(
        self,
        app: Celery,
        node: str,
        threads: int,
        warm: Callable[[], Iterable[WarmModel]],
        on_ready: Callable[[], object],
    ) -> None:
        self._app = app
        self._warm = warm
        self._tell_ready = on_ready
        super().__init__(
            app=app,
            hostname=node,
            consumer_cls=TicketConsumer,
            pool="threads",
            concurrency=threads,
            queues=sorted(self._wanted()),
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
        self._consumer = consumer
        OpenQueues(consumer.task_consumer.channel, lambda: frozenset(self._closed()))
        # In its own thread, which alone may: again after each reconnection, when it is another consumer.
        consumer.hub.call_repeatedly(LOOK_AGAIN_S, self._consume_what_is_warm, consumer)
        self._tell_ready()

    def _consume_what_is_warm(self, consumer: Any) -> None:
        """Consume the queues of the models that are warm now, and no others."""
        if consumer is not self._consumer or state.should_stop is not None:
            return
        wanted = self._wanted()
        consumed = {name for name in consumer.app.amqp.queues.consume_from if name.startswith(PREFIX)}
        for name in wanted - consumed:
            consumer.add_task_queue(name)
        for name in consumed - wanted:
            consumer.cancel_task_queue(name)

    def _wanted(self) -> set[str]:
        return {self._known(queue) for model in self._warm() for queue in model.queues}

    def _closed(self) -> Iterator[str]:
        """The queues of models that have as many tickets in hand as slots."""
        in_hand = Counter(request.delivery_info.get("routing_key") for request in list(state.requests.values()))
        for model in self._warm():
            names = [self._known(queue) for queue in model.queues]
            if sum(in_hand[name] for name in names) >= model.slots:
                yield from names

    def _known(self, queue: str | Queue) -> str:
        """Its name; one that has options is known by them from now on."""
        if isinstance(queue, str):
            return queue
        if queue.name not in self._app.amqp.queues:
            self._app.amqp.queues.add(queue)
        return str(queue.name)


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
