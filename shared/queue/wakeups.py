"""The Celery app shared by API, workers and Flower, and the notifier that sends wake-ups.

A wake-up tells all workers that a model has queued jobs. Correctness does not depend on it: a worker with free capacity
also polls once a second, so wake-ups may be lost, late or repeated. `enqueue.lua` decides whether one is needed; at
most one is in flight per model.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from typing import Final

import redis
from celery import Celery
from kombu import Exchange, Queue
from kombu.exceptions import LimitExceeded, OperationalError

from shared.load_settings import load_or_exit
from shared.queue import broker
from shared.settings import Settings

log = logging.getLogger(__name__)

TASK: Final = "mlxq.run"
"""Task name under which Flower shows jobs."""
LOAD, UNLOAD = "mlxq_load_model", "mlxq_unload_model"
DOWNLOAD, CANCEL_DOWNLOAD = "mlxq_download_model", "mlxq_cancel_download"
"""Commands of Celery's remote control for models."""
WAKEUPS: Final = Exchange("mlxq.wakeups", type="fanout", durable=False, delivery_mode="transient")


def make_app(settings: Settings, *, hasty: bool = False) -> Celery:
    """Create the Celery app. It has no result backend: results are in the job's record.

    Args:
        hasty: for processes that only send. Calls then fail after one second if the broker is unreachable, and at once
            if it rejects them. By default kombu retries for six seconds, even with `retry=False`.
    """
    app = Celery("mlxq", broker=broker.kombu_url(settings.celery_url), set_as_current=not hasty)
    app.conf.update(
        broker_use_ssl=broker.tls_options(settings.celery_url),
        task_ignore_result=True,
        task_serializer="json",
        accept_content=["json"],
        worker_send_task_events=True,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_channel_error_retry=True,  # such as a broker that is out of memory for now
        broker_transport_options={
            **broker.transport_options(settings.celery_url, timeout_s=1 if hasty else 5),
            "ack_emulation": False,  # otherwise kombu keeps each message in Redis until it is acknowledged
            **({"max_retries": 0} if hasty else {}),
        },
    )
    return app


def wakeup_queue(node: str) -> Queue:
    """Return the queue on which a worker process receives wake-ups; it is deleted when the process ends."""
    return Queue(f"mlxq.wakeups.{node}", WAKEUPS, auto_delete=True, durable=False, exclusive=True)


SEND_S: Final = 2.0
"""Maximum wait for a free connection to the broker."""
PAUSE_S: Final = 3.0
"""Time after a broker failure in which no wake-ups are sent: an attempt takes up to a second, and workers also poll."""


class Notifier:
    """Sends wake-ups."""

    def __init__(self, app: Celery) -> None:
        self._app = app
        self._paused_until = float("-inf")

    def wake(self, models: Iterable[str]) -> None:
        """Tell all workers that these models have queued jobs. Errors of the broker are logged, not raised."""
        for model in models:
            if time.monotonic() < self._paused_until:
                return
            try:
                self._send(model)
            except (OperationalError, LimitExceeded, redis.RedisError, OSError) as error:
                log.warning("wakeup_not_sent", extra={"model": model, "reason": str(error)})
                self._paused_until = time.monotonic() + PAUSE_S

    def _send(self, model: str) -> None:
        with self._app.producer_pool.acquire(block=True, timeout=SEND_S) as producer:
            producer.publish(
                {"model": model}, exchange=WAKEUPS, declare=[WAKEUPS], serializer="json", retry=False, expiration=5
            )


app = make_app(load_or_exit())
