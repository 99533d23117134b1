"""Switches models on running workers: asks one by Celery's remote control; an operation has the progress."""

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

log = logging.getLogger(__name__)

DEMAND_S: Final = 30
"""A model that jobs wait for is asked for once in so long: a load that failed is tried again."""


class ModelManager:
    """Begins operations and reads them."""

    def __init__(
        self, app: Celery, operations: Operations, registry: Registry, catalog: Catalog, *, on_demand: bool
    ) -> None:
        self._app = app
        self._operations = operations
        self._registry = registry
        self._catalog = catalog
        self._on_demand = on_demand

    def load(self, asked: str, worker: str | None = None, *, replace: bool = False, pin: bool = False) -> Operation:
        """Have a worker load a model: the one named, or one that has it already, or the one with most memory left.

        Raises:
            NotFound: the catalog has no such model.
            Invalid: there is no such worker.
            Unavailable: there is no worker at all, or the broker is away.
        """
        model = self._catalog.resolve(asked)
        if model is None:
            raise NotFound("The catalog has no such model.", code="model_not_found", field="model")
        hosts = self._hosts(worker)
        having = [host for host in hosts if model.id in host.models]
        host = having[0] if having else _roomiest(hosts, model.measure())
        operation = self._operations.begin("load", model.id, host.node)
        self._tell(LOAD, host, {"operation": operation.id, "model": model.id, "replace": replace, "pin": pin})
        return operation

    def unload(self, asked: str, worker: str | None = None) -> Operation:
        """Have a worker let go of a model.

        Raises:
            NotFound: no worker has it.
            Invalid: there is no such worker, or several have the model and none is named.
            Unavailable: there is no worker at all, or the broker is away.
        """
        model = self._catalog.resolve(asked)
        name = model.id if model else asked
        having = [host for host in self._hosts(worker) if name in host.models]
        if not having:
            raise NotFound("No worker has this model loaded.", code="model_not_loaded", field="model")
        if len(having) > 1:
            nodes = ", ".join(host.node for host in having)
            raise Invalid(f"Several workers have it, name one: {nodes}.", code="worker_needed", field="worker")
        operation = self._operations.begin("unload", name, having[0].node)
        self._tell(UNLOAD, having[0], {"operation": operation.id, "model": name})
        return operation

    def get(self, name: str) -> Operation:
        """One of the last day.

        Raises:
            NotFound: there is none.
        """
        found = self._operations.get(name, self._registry.hosts())
        if found is None:
            raise NotFound("There is no such operation.", code="operation_not_found")
        return found

    def recent(self) -> list[Operation]:
        """The newest first."""
        return self._operations.recent(self._registry.hosts())

    def demand(self, model: str) -> None:
        """Have a model loaded that a job waits for and no worker has; maintenance repeats what fails now."""
        if not self._on_demand or model not in self._catalog.models:
            return
        try:
            hosts = self._registry.hosts()
            if not hosts or any(model in host.models for host in hosts):
                return
            if self._operations.may_demand(model, DEMAND_S):
                log.info("model_demanded", extra={"model": model})
                self._operations.demanded(self.load(model))
        except (redis.RedisError, OperationalError, OSError, Unavailable) as error:
            log.warning("model_not_demanded", extra={"model": model, "reason": str(error)})

    def check_demand(self, model: str) -> None:
        """Check that a model which no worker has fits one, and has not just failed to load.

        Raises:
            Unavailable: it does not fit, or has failed.
        """
        entry, hosts = self._catalog.models.get(model), self._registry.hosts()
        if entry and hosts and not any(host.could_take(entry.weights_bytes) for host in hosts):
            told = f"The model is not loaded: no worker has {entry.weights_bytes / 2**20:,.0f} MiB for it."
            raise Unavailable(told, code="model_not_loaded", field="model", retry_after=DEMAND_S)
        tried = self._operations.on_demand(model)
        if tried is not None and tried.state is OperationState.FAILED:
            told = f"The model is not loaded, and loading it failed: {tried.error_message}"
            raise Unavailable(told, code="model_not_loaded", field="model", retry_after=DEMAND_S)

    def demand_waiting(self) -> None:
        """The same for all models that jobs wait for."""
        if self._on_demand:
            for model in self._catalog.models:
                if self._registry.waiting(model):
                    self.demand(model)

    def _hosts(self, worker: str | None) -> list[HostInfo]:
        hosts = self._registry.hosts()
        if not hosts:
            raise Unavailable("No worker is there.", code="no_worker", retry_after=5)
        named = [host for host in hosts if worker in (None, host.node)]
        if not named:
            raise Invalid(
                f"There is no such worker; there are {_names(hosts)}.", code="worker_not_found", field="worker"
            )
        return named

    def _tell(self, command: str, host: HostInfo, arguments: dict[str, object]) -> None:
        try:
            self._app.control.broadcast(command, arguments=arguments, destination=[host.node])
        except (OperationalError, OSError) as error:
            log.warning("worker_not_reached", extra={"node": host.node, "reason": str(error)})
            raise Unavailable("The workers cannot be reached at the moment.", retry_after=2) from error


def _roomiest(hosts: Collection[HostInfo], needed: int) -> HostInfo:
    """The worker with most memory left; where that is too little, the one where most can be had by unloading."""
    free = max(hosts, key=lambda host: host.memory_limit - host.memory_used)
    if free.memory_limit - free.memory_used >= needed:
        return free
    return max(hosts, key=lambda host: host.memory_limit - host.memory_pinned)


def _names(hosts: Iterable[HostInfo]) -> str:
    return ", ".join(host.node for host in hosts)
