"""Load and unload models on running workers.

A worker is asked through Celery's remote control. It reports progress in an operation (`shared.models.operations`).
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable
from typing import Final

import redis
from celery import Celery
from kombu.exceptions import OperationalError

from shared.errors import Invalid, NotFound, Unavailable
from shared.models.catalog import Catalog
from shared.models.operations import Operation, Operations, OperationState
from shared.models.registry import HostInfo, Registry
from shared.queue.wakeups import LOAD, UNLOAD
from web.cluster.model_availability import model_not_found, too_large

log = logging.getLogger(__name__)

DEMAND_INTERVAL_S: Final = 30
"""Seconds between requests to load the same model on demand. A load that failed is tried again after this time."""


class ModelManager:
    """Starts operations and reads their state."""

    def __init__(
        self, app: Celery, operations: Operations, registry: Registry, catalog: Catalog, *, on_demand: bool
    ) -> None:
        self._app = app
        self._operations = operations
        self._registry = registry
        self._catalog = catalog
        self._on_demand = on_demand

    def load(
        self, name: str, worker: str | None = None, *, replace: bool = False, pin: bool | None = None
    ) -> Operation:
        """Ask a worker to load a model.

        Without `worker`, a worker that already has the model is chosen, otherwise the one with the most free memory.

        Raises:
            NotFound: the catalog has no such model.
            Invalid: there is no such worker.
            Unavailable: there is no worker at all, or the broker is unavailable.
        """
        model = self._catalog.resolve(name)
        if model is None:
            raise model_not_found(name)
        hosts = self.hosts(worker)
        with_model = [host for host in hosts if model.id in host.models]
        host = with_model[0] if with_model else _host_for(hosts, model.measure())
        operation = self._operations.begin("load", model.id, host.node)
        self.send(LOAD, host.node, {"operation": operation.id, "model": model.id, "replace": replace, "pin": pin})
        return operation

    def unload(self, name: str, worker: str | None = None) -> Operation:
        """Ask a worker to unload a model.

        Raises:
            NotFound: no worker has the model.
            Invalid: there is no such worker, or several workers have the model and `worker` is None.
            Unavailable: there is no worker at all, or the broker is unavailable.
        """
        model = self._catalog.resolve(name)
        model_id = model.id if model else name
        with_model = [host for host in self.hosts(worker) if model_id in host.models]
        if not with_model:
            detail = f"No worker has the model {model_id!r} loaded."
            raise NotFound(detail, code="model_not_loaded", field="model")
        if len(with_model) > 1:
            detail = f"Several workers have this model. Set worker to one of: {_names(with_model)}."
            raise Invalid(detail, code="worker_needed", field="worker")
        host = with_model[0]
        operation = self._operations.begin("unload", model_id, host.node)
        self.send(UNLOAD, host.node, {"operation": operation.id, "model": model_id})
        return operation

    def get(self, operation_id: str) -> Operation:
        """Return an operation of the last 24 hours.

        Raises:
            NotFound: there is no such operation.
        """
        operation = self._operations.get(operation_id, self._registry.hosts())
        if operation is None:
            detail = "There is no such operation. Operations are kept for 24 hours."
            raise NotFound(detail, code="operation_not_found")
        return operation

    def recent(self, limit: int = 50) -> list[Operation]:
        """Return up to `limit` operations of the last 24 hours, newest first."""
        return self._operations.recent(self._registry.hosts(), limit)

    def load_on_demand(self, model: str) -> None:
        """Load a model for a waiting job, unless a worker has it. On failure, maintenance tries again later."""
        if not self._on_demand or model not in self._catalog.models:
            return
        try:
            hosts = self._registry.hosts()
            if not hosts or any(model in host.models for host in hosts):
                return
            if self._operations.claim_demand(model, DEMAND_INTERVAL_S):
                log.info("load_on_demand", extra={"model": model})
                self._operations.store_demand(self.load(model))
        except (redis.RedisError, OperationalError, OSError, Unavailable) as error:
            log.warning("load_on_demand_failed", extra={"model": model, "reason": str(error)})

    def load_for_waiting_jobs(self) -> None:
        """Call `load_on_demand` for every model that jobs are waiting for."""
        if self._on_demand:
            for model in self._catalog.models:
                if self._registry.waiting(model):
                    self.load_on_demand(model)

    def check_load_on_demand(self, model: str) -> None:
        """Check that a model which no worker has can be loaded.

        Raises:
            Unavailable: no worker has enough memory, or loading it has just failed.
        """
        entry, hosts = self._catalog.models.get(model), self._registry.hosts()
        if entry and hosts and not any(host.can_fit(entry.weights_bytes) for host in hosts):
            raise _not_loaded(too_large(entry))
        last = self._operations.demanded(model)
        if last is not None and last.state is OperationState.FAILED:
            raise _not_loaded(f"Loading the model failed: {last.error_message}")

    def workers_with(self, model: str) -> list[str]:
        """Return the names of the workers that have a model."""
        return [host.node for host in self._registry.hosts() if model in host.models]

    def hosts(self, worker: str | None) -> list[HostInfo]:
        """Return all workers, or only the named one.

        Raises:
            Invalid: there is no such worker.
            Unavailable: there is no worker at all.
        """
        hosts = self._registry.hosts()
        if not hosts:
            raise Unavailable("No worker is running.", code="no_worker", retry_after=5)
        matching = [host for host in hosts if worker in (None, host.node)]
        if not matching:
            detail = f"There is no such worker. The workers are: {_names(hosts)}."
            raise Invalid(detail, code="worker_not_found", field="worker")
        return matching

    def send(self, command: str, node: str, arguments: dict[str, object]) -> None:
        """Send a command to a worker.

        Raises:
            Unavailable: the broker is unavailable.
        """
        try:
            self._app.control.broadcast(command, arguments=arguments, destination=[node])
        except (OperationalError, OSError) as error:
            log.warning("worker_unreachable", extra={"node": node, "reason": str(error)})
            detail = "The message broker is unavailable. Try again shortly."
            raise Unavailable(detail, retry_after=2) from error


def _not_loaded(detail: str) -> Unavailable:
    return Unavailable(detail, code="model_not_loaded", field="model", retry_after=DEMAND_INTERVAL_S)


def _host_for(hosts: Collection[HostInfo], needed_bytes: int) -> HostInfo:
    """Choose the worker with the most free memory; if that is not enough, the one that can free the most."""
    freest = max(hosts, key=lambda host: host.memory_limit - host.memory_used)
    if freest.memory_limit - freest.memory_used >= needed_bytes:
        return freest
    return max(hosts, key=lambda host: host.memory_limit - host.memory_pinned)


def _names(hosts: Iterable[HostInfo]) -> str:
    return ", ".join(host.node for host in hosts)
