"""Which models can still be served: refuses and ends jobs that would otherwise wait without limit.

A job cannot run if no worker has its model and no catalog of an API process lists it, if the model does not load, or if
no worker has enough memory for it. API processes mark the models that they know of in Redis, so that a process with
another catalog, as in a rolling restart, does not end their jobs.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import Final

from shared.errors import Invalid, JobFailure, NotFound
from shared.jobs.store import Jobs
from shared.models.catalog import Catalog, CatalogModel
from shared.models.operations import LoadFailure, Operations, OperationState
from shared.models.registry import HostInfo, Registry

log = logging.getLogger(__name__)

GRACE_S: Final = 60.0
"""Time without any process that could serve a model after which its jobs fail: longer than a restart takes."""
MARK_S: Final = 10.0
"""Interval at which a process marks the models that it knows of."""


class ModelAvailability:
    """Decides whether a model can be served.

    Args:
        on_demand: whether models are loaded for waiting jobs.
        clock: seconds of a monotonic clock.
    """

    def __init__(
        self,
        registry: Registry,
        operations: Operations,
        jobs: Jobs,
        catalog: Catalog,
        *,
        on_demand: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._registry = registry
        self._operations = operations
        self._jobs = jobs
        self._catalog = catalog
        self._on_demand = on_demand
        self._clock = clock
        self._started_at: float | None = None  # the first round
        self._mark_at = 0.0
        self._too_large_since: dict[str, float] = {}

    def check(self, model: str) -> None:
        """Check that a model which no worker has may become available.

        Raises:
            NotFound: no catalog lists the model, and no worker has had it lately.
            Invalid: the model does not load.
        """
        if model not in self._catalog.models:
            if model not in self._registry.servable(GRACE_S):
                raise model_not_found(model)
        elif self._on_demand and (reason := self._load_failure(model, self._registry.hosts())):
            raise Invalid(reason, code=JobFailure.LOAD, field="model")

    def round(self) -> None:
        """Mark the models that can be served, and fail the waiting jobs of those that cannot."""
        if self._started_at is None:
            self._started_at = self._mark_at = self._clock()
        hosts = self._registry.hosts()
        loaded = {worker.model for worker in self._registry.workers()}.union(*(host.models for host in hosts))
        if self._clock() >= self._mark_at:
            self._registry.mark_servable(loaded.union(self._catalog.models))
            self._mark_at = self._clock() + MARK_S
        for model in self._waiting():
            reason = None if model in loaded else self._why_never(model, hosts)
            if reason and (failed := self._jobs.fail_waiting(model, *reason)):
                log.warning("waiting_jobs_failed", extra={"model": model, "jobs": failed, "reason": reason[1]})

    def _waiting(self) -> list[str]:
        """Return the models that jobs are waiting for."""
        names = sorted({*self._catalog.models, *self._registry.known_models()})
        return [name for name, count in zip(names, self._registry.waiting_each(names), strict=True) if count]

    def _why_never(self, model: str, hosts: Collection[HostInfo]) -> tuple[JobFailure, str] | None:
        """Return why a model that no worker has will not be served; None if it may be."""
        if model not in self._catalog.models:
            # After an outage of all processes, the marks are old although workers are about to start.
            if self._clock() < (self._started_at or 0.0) + GRACE_S or model in self._registry.servable(GRACE_S):
                return None
            return JobFailure.MODEL, model_not_found(model).detail
        if not self._on_demand or not hosts:
            return None
        reason = self._load_failure(model, hosts) or self._too_large(model, hosts)
        return (JobFailure.LOAD, reason) if reason else None

    def _too_large(self, model: str, hosts: Collection[HostInfo]) -> str | None:
        """Return a message if no worker has had enough memory for a model for some time."""
        entry, now = self._catalog.models[model], self._clock()
        if any(host.can_fit(entry.weights_bytes) for host in hosts):
            self._too_large_since.pop(model, None)
            return None
        if now - self._too_large_since.setdefault(model, now) < GRACE_S:
            return None
        return too_large(entry)

    def _load_failure(self, model: str, hosts: Collection[HostInfo]) -> str | None:
        """Return why a model does not load. A changed folder or a new worker process is given another try."""
        folder, processes = _fingerprint(self._catalog.models[model]), {f"{host.node} {host.pid}" for host in hosts}
        failure, last = self._operations.load_failure(model), self._operations.demanded(model)
        if (
            last is not None
            and (last.state, last.error_code) == (OperationState.FAILED, JobFailure.LOAD)
            and (failure is None or failure.operation != last.id)
        ):
            failure = LoadFailure(last.id, last.error_message or "The model does not load.", folder, sorted(processes))
            self._operations.store_load_failure(model, failure)
        if failure is None or failure.folder != folder or not processes.issubset(failure.processes):
            return None
        return failure.message


def model_not_found(model: str) -> NotFound:
    """Return the error for a model that nothing can serve."""
    detail = f"There is no model {model!r}. GET /inference/models lists the available models."
    return NotFound(detail, code=JobFailure.MODEL, field="model")


def too_large(model: CatalogModel) -> str:
    """Return the message for a model that fits on no worker."""
    return f"No worker has {model.weights_bytes / 2**20:,.0f} MiB of memory for this model."


def _files(folder: Path) -> list[tuple[str, int, int]]:
    """Return name, size and time of each file; nothing for files that cannot be read, such as a dangling link."""
    files = []
    with suppress(OSError):  # the folder may be on the workers' machines only
        for path in sorted(folder.iterdir()):
            with suppress(OSError):
                files.append((path.name, path.stat().st_size, path.stat().st_mtime_ns))
    return files


def _fingerprint(model: CatalogModel) -> str:
    """Return a value that changes with the model's files and its catalog entry."""
    files = [_files(folder) for folder in (model.path, model.adapter) if folder is not None]
    return hashlib.sha256(repr((files, model)).encode()).hexdigest()[:32]
