"""Celery: the app that API, workers and Flower share, and the wake-ups that go through it.

A wake-up says "model M has work" to all workers at once. Nothing depends on it: a worker with room also looks once a
second without one, so a lost, late or repeated wake-up changes nothing. `enqueue.lua` says when one is needed: while
one is under way for a model, no other is sent.
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

from shared.queue import broker
from shared.settings import Settings, load_or_exit

log = logging.getLogger(__name__)

TASK: Final = "mlxq.run"
"""The name under which Flower shows jobs."""
LOAD, UNLOAD = "mlxq_load_model", "mlxq_unload_model"
"""Commands of Celery's remote control."""
WAKEUPS: Final = Exchange("mlxq.wakeups", type="fanout", durable=False, delivery_mode="transient")


def make_app(settings: Settings, *, hasty: bool = False) -> Celery:
    """The Celery app. It stores no results: they are in the job's record.

    Args:
        hasty: for processes that only send: fail after a second when the broker is away, and at once when it refuses.
            kombu's default retries for six seconds, whatever `retry` says.
    """
    app = Celery("mlxq", broker=broker.kombu_url(settings.celery_url), set_as_current=not hasty)
    app.conf.update(
        task_ignore_result=True,
        task_serializer="json",
        accept_content=["json"],
        worker_send_task_events=True,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_channel_error_retry=True,  # a broker without memory will have some again
        broker_transport_options={
            **broker.transport_options(settings.celery_url, timeout_s=1 if hasty else 5),
            "ack_emulation": False,  # kombu would keep each message in Redis until it is acknowledged
            **({"max_retries": 0} if hasty else {}),
        },
    )
    return app


def wakeup_queue(node: str) -> Queue:
    """The queue on which one worker process receives wake-ups; it is deleted when the process ends."""
    return Queue(f"mlxq.wakeups.{node}", WAKEUPS, auto_delete=True, durable=False, exclusive=True)


SEND_S: Final = 2.0
"""Longest wait for a free connection to the broker."""
PAUSE_S: Final = 3.0
"""Pause in sending wake-ups after the broker failed. A try takes up to a second, and workers also look without one."""


class Notifier:
    """Sends wake-ups."""

    def __init__(self, app: Celery) -> None:
        self._app = app
        self._paused_until = float("-inf")

    def wake(self, models: Iterable[str]) -> None:
        """Wake all workers because jobs wait for these models, unless the broker is away."""
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
