"""The loop of a background process: wait for the leadership, then work until it is lost."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Final

import gevent
import redis

from shared.redis.client import connect, passes
from web.background.archiver import Archiver
from web.background.batch_runner import LOOK_S, BatchRunner
from web.background.endpoints import make_endpoints
from web.background.key_eraser import KeyEraser
from web.background.leader import RENEW_S, Leadership
from web.background.response_keeper import ResponseKeeper
from web.batches.requests import LineRequests
from web.cluster.samples import INTERVAL_S
from web.services import Services
from web.webhooks.sender import Sender

log = logging.getLogger(__name__)

_LEASE_TIMEOUT_S: Final = 1.0


class Background:
    """One background process."""

    def __init__(self, current: Services) -> None:
        self._stopping = threading.Event()
        client = connect(current.settings.store_url, timeout_s=_LEASE_TIMEOUT_S, retries=0)
        self._leadership = Leadership(client)
        self._services = current

    def stop(self) -> None:
        """Let `run` return."""
        self._stopping.set()

    def run(self) -> None:
        """Work until `stop` is called."""
        unreachable = False
        while not self._stopping.is_set():
            try:
                if self._leadership.acquire():
                    self._lead()
                unreachable = False
            except redis.RedisError as error:
                if not passes(error):
                    log.exception("election_failed")
                elif not unreachable:
                    log.warning("election_paused", extra={"reason": str(error)})
                unreachable = True
            self._stopping.wait(RENEW_S)

    def _lead(self) -> None:
        """Work while this process leads."""
        batches = self._batch_runner()
        working: list[gevent.Greenlet[..., None]] = [
            gevent.spawn(self._work, batches.round),
            gevent.spawn(self._work, self._response_keeper().round),
            gevent.spawn(self._work, self._archiver().round),
            gevent.spawn(self._work, KeyEraser(self._services, self._leads).round),
            gevent.spawn(self._sender().work, self._stopping),
            gevent.spawn(self._sample),
        ]
        try:
            self._leadership.hold(self._stopping)
        finally:
            gevent.joinall(working)
            batches.join()
            self._leadership.release()

    def _leads(self) -> bool:
        return self._leadership.valid and not self._stopping.is_set()

    def _sender(self) -> Sender:
        current = self._services
        return Sender(
            current.deliveries,
            current.receivers,
            current.webhook_urls,
            current.settings.webhook_timeout_s,
            lambda: self._leadership.token,
            self._leads,
        )

    def _work(self, work_round: Callable[[], None]) -> None:
        while self._leads():
            try:
                self._services.catalog_updates.refresh_if_due()
                work_round()
            except redis.RedisError as error:
                log.warning("background_paused", extra={"reason": str(error)})
            except Exception:
                log.exception("background_round_failed")
            self._stopping.wait(LOOK_S)

    def _response_keeper(self) -> ResponseKeeper:
        current = self._services
        return ResponseKeeper(current.settings, current.responses, current.response_store, current.jobs)

    def _archiver(self) -> Archiver:
        current = self._services
        return Archiver(
            current.settings,
            current.archive,
            current.archive_queue,
            current.usage,
            lambda: current.keys.entries().keys(),
            self._leads,
        )

    def _sample(self) -> None:
        """Take samples of the service's state. They continue those of the process that led before."""
        while self._leads():
            try:
                self._services.samples.take()
            except redis.RedisError as error:
                log.warning("sample_not_taken", extra={"reason": str(error)})
            except Exception:
                log.exception("sample_failed")
            next_at = time.monotonic() + INTERVAL_S
            while self._leads() and time.monotonic() < next_at:
                self._stopping.wait(LOOK_S)

    def _batch_runner(self) -> BatchRunner:
        current = self._services
        requests = LineRequests(
            current.settings,
            current.admission,
            current.image_loader,
            current.jobs,
            make_endpoints(current),
            current.keys.limits_of,
            current.tracer,
        )
        return BatchRunner(
            current.settings,
            current.batches,
            current.files,
            current.jobs,
            requests,
            self._leadership,
            self._stopping,
        )
