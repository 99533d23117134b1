"""Celery: the app that API, workers and Flower share, and the tickets that go through it.

A ticket says "there is work for model M" and names the job it was sent for, so that Flower shows something to
look for; which job its worker gets is up to the claim. One too many finds nothing and ends. One that was lost is
made up for by `TicketOffice.rescue`.
"""

from __future__ import annotations

from collections.abc import Iterable

from celery import Celery
from kombu import Exchange, Queue
from kombu.exceptions import OperationalError

from shared.models.registry import Registry
from shared.queue import broker, keys
from shared.queue.claims import Waiting
from shared.queue.redis import Redis
from shared.settings import Settings, load_or_exit

TASK = "mlxq.run"
LOAD, UNLOAD = "mlxq_load_model", "mlxq_unload_model"
"""Commands of Celery's remote control."""

PREFIX = "mlxq."
"""So the names of all queues of models begin."""

OWN_QUEUE_S = 300.0
"""A worker's own queue is gone so long after the worker; a worker that comes back makes it anew."""


def queue_name(model: str) -> str:
    """The Celery queue of a model."""
    return f"{PREFIX}{model}"


def own_queue(model: str, node: str) -> Queue:
    """The Celery queue of one worker of a model: what is sent there, no other takes."""
    name = f"{queue_name(model)}@{node}"
    return Queue(name, Exchange(name), name, expires=OWN_QUEUE_S)


def make_app(settings: Settings, *, hasty: bool = False) -> Celery:
    """The Celery app. Results are off: a job's record holds them.

    Args:
        hasty: for who only sends. A broker that is away is told after a second, or at once when it refuses; kombu
            would try again for six, whatever `retry` says.
    """
    app = Celery("mlxq", broker=broker.kombu_url(settings.tickets_url), set_as_current=not hasty)
    app.conf.update(
        task_ignore_result=True,
        task_store_errors_even_if_ignored=False,
        task_serializer="json",
        accept_content=["json"],
        task_create_missing_queues=True,
        # Flower follows a ticket from `received` on. What waits is told by the queue itself, and to tell Flower of it
        # would cost each submit a tenth of its time.
        worker_send_task_events=True,
        task_send_sent_event=False,
        # A ticket is spent when it starts: what must not be lost is the job, and the claim keeps that.
        task_acks_late=False,
        # A full worker leaves tickets to the others instead of holding as many again as it has threads.
        worker_prefetch_multiplier=1,
        worker_disable_prefetch=True,
        # Nor is there anything to be careful about when the broker comes back.
        worker_enable_prefetch_count_reduction=False,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_channel_error_retry=True,  # a broker without memory is not for ever, either
        broker_transport_options={
            **broker.transport_options(settings.tickets_url, timeout_s=1 if hasty else 5),
            # The same for one that a worker has taken: kombu would keep it in Redis, which may have no memory for it.
            "ack_emulation": False,
            **({"max_retries": 0} if hasty else {}),
        },
    )
    return app


class TicketOffice:
    """Sends tickets."""

    def __init__(self, app: Celery, client: Redis, registry: Registry) -> None:
        self._app = app
        self._client = client
        self._registry = registry

    def send(self, model: str, job_id: str, node: str | None = None) -> None:
        """Tell the workers of a model, or one of them, that a job waits.

        Raises:
            kombu.exceptions.OperationalError: the broker is away. The job is safe: `rescue` will send it.
        """
        queue = own_queue(model, node) if node else queue_name(model)
        asked = {"model": model, "job_id": job_id}
        self._app.send_task(TASK, kwargs=asked, queue=queue, retry=False)  # type: ignore[arg-type]  # a Queue will do

    def send_all(self, waiting: Iterable[Waiting]) -> None:
        """Send a ticket for each."""
        for each in waiting:
            self.send(each.model, each.job_id)

    def remind(self, model: str, job_id: str) -> None:
        """Send the ticket that a job's wait for its worker has used up, if there is anything to do for it.

        Whether that very job waits does not matter: who took it may have come with the ticket of another.
        """
        if self._registry.waiting(model):
            self.send(model, job_id)

    def rescue(self) -> int:
        """Send tickets where jobs wait although their model's workers have free slots: some must have been lost.

        Called every second or so by every process; once in two seconds and model it does something. Tickets that still
        lie in the broker are counted, so that a worker which is slow to take them, or never does, is not sent more.

        Returns:
            The number sent.
        """
        free: dict[str, int] = {}
        for worker in self._registry.workers():
            if worker.state == "ready":
                free[worker.model] = free.get(worker.model, 0) + worker.slots - worker.slots_used
        return sum(self.rescue_model(model, slots) for model, slots in free.items() if slots > 0)

    def rescue_model(self, model: str, slots: int) -> int:
        """The same for one model; at most `slots` tickets."""
        heads = self._client.zrange(keys.QUEUE + model, 0, slots - 1)
        if not heads or not self._client.set(keys.RESCUE + model, 1, nx=True, ex=2):
            return 0
        missing = heads[self._on_their_way(model) :]
        self.send_all(Waiting(model, job_id) for job_id in missing)
        return len(missing)

    def _on_their_way(self, model: str) -> int:
        """Tickets that no worker has taken yet."""
        with self._app.connection_or_acquire() as connection:
            try:
                return int(connection.default_channel.queue_declare(queue_name(model), passive=True).message_count)
            except connection.channel_errors:  # there is no such queue, as on Redis when it is empty
                return 0
            except connection.connection_errors as error:
                raise OperationalError(str(error)) from error


app = make_app(load_or_exit())
