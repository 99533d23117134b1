"""Loads and unloads models on a running worker, one command after another, in its own thread. Unloads unused models.

A model is loaded in addition to the others if there is enough memory. Otherwise the least recently used models that are
not pinned are drained and unloaded first. If loading fails, the previous models stay loaded or are loaded again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue
from typing import Any, Final, Protocol

from redis import RedisError

from shared.models.catalog import Catalog, CatalogModel
from shared.models.operations import Operations, OperationState
from shared.models.registry import MIN_CACHE_SHARE
from worker.models.load import first_line
from worker.service.model_worker import ModelWorker
from worker.service.operation_progress import PUBLISH_EVERY_S, OperationProgress, log_unpublished, retry

logger = logging.getLogger(__name__)

UNUSED_CHECK_S: Final = 1.0
"""Interval between searches for unused models."""


class Refused(Exception):
    """A command cannot be carried out; `code` is stable."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Models(Protocol):
    """The models of this worker process; see `worker.service.pool`."""

    catalog: Catalog
    memory_limit: int

    @property
    def workers(self) -> Sequence[ModelWorker]:
        """The model workers of this process, loading ones included."""
        ...

    def open(self, model: CatalogModel, *, pinned: bool = False) -> ModelWorker:
        """Begin to load a model."""
        ...

    def serve(self, worker: ModelWorker) -> None:
        """Claim jobs for a model that is loaded."""
        ...

    def close(self, worker: ModelWorker) -> None:
        """Drain and unload a model; return when that is done."""
        ...

    def unused(self) -> Sequence[ModelWorker]:
        """Return the models to unload because nothing has used them for long."""
        ...

    def fits(self, model: CatalogModel, others: Iterable[ModelWorker]) -> bool:
        """Return whether a model fits in addition to others, with some memory left for their jobs."""
        ...

    def free_memory(self, needed_bytes: int) -> bool:
        """Shrink the caches of the loaded models; return whether `needed_bytes` became free in time."""
        ...

    def divide_memory(self) -> None:
        """Divide the memory that the models leave among their caches."""
        ...

    def memory_used(self) -> int:
        """Bytes in use by the model library."""
        ...


@dataclass(frozen=True, slots=True)
class SwitchCommand:
    """A command to load or unload a model.

    Attributes:
        operation: id of its operation.
        kind: `load` or `unload`.
        replace: whether to unload all other models that are not pinned, even if there is memory for all.
        pin: whether the model is pinned; None: as the catalog says, or as it is if it is loaded.
    """

    operation: str
    kind: str
    model: str
    replace: bool = False
    pin: bool | None = None


class Switcher(threading.Thread):
    """Carries out commands one after another.

    Args:
        announce: announces the models and `operations` of this process before it returns.
        announce_soon: does the same in another thread.
        refresh_catalog: adds the models that were downloaded since the catalog was read.
    """

    def __init__(
        self,
        models: Models,
        operations: Operations,
        announce: Callable[[], object],
        announce_soon: Callable[[], object] = lambda: None,
        refresh_catalog: Callable[[], object] = lambda: None,
    ) -> None:
        super().__init__(name="switcher", daemon=True)
        self._models = models
        self._operations = operations
        self._announce = announce
        self._announce_soon = announce_soon
        self._refresh_catalog = refresh_catalog
        self._commands: SimpleQueue[SwitchCommand | None] = SimpleQueue()
        self._unfinished: tuple[str, ...] = ()
        self._lock = threading.Lock()

    @property
    def operations(self) -> tuple[str, ...]:
        """Ids of the operations that are queued or under way here."""
        return self._unfinished

    def put(self, command: SwitchCommand) -> None:
        """Queue a command. Its operation is `waiting` at once, because earlier commands may take long."""
        with self._lock:
            if command.operation in self._unfinished:
                return  # the broker delivered the command twice
            self._unfinished = (*self._unfinished, command.operation)
        self._announce_soon()
        try:
            operation = self._operations.read(command.operation)
            if operation and not operation.state.terminal:
                self._operations.put(replace(operation, state=OperationState.WAITING))
        except RedisError as error:
            log_unpublished(command.operation, error)
        self._commands.put(command)

    def close(self) -> None:
        """End the thread after the queued commands."""
        self._commands.put(None)

    def run(self) -> None:
        """Carry out commands until closed."""
        while (command := self._next_command()) is not None:
            try:
                self._execute(command)
            except RedisError as error:
                log_unpublished(command.operation, error)
            except Exception:  # such as an operation that cannot be read: it must not stop the following commands
                logger.exception("operation_not_published", extra={"operation": command.operation})
            with self._lock:
                self._unfinished = tuple(name for name in self._unfinished if name != command.operation)

    def _next_command(self) -> SwitchCommand | None:
        """Wait for the next command, and meanwhile unload unused models. None: end the thread."""
        while True:
            try:
                return self._commands.get(timeout=UNUSED_CHECK_S)
            except Empty:
                self._unload_unused()

    def _unload_unused(self) -> None:
        for worker in self._models.unused():
            logger.info("unused_model_unloaded", extra={"model": worker.model.id})
            try:
                self._models.close(worker)  # a job that was claimed in this moment runs to its end, or is handed back
                self._announce()
            except RedisError as error:
                logger.debug("host_not_announced", extra={"reason": str(error)})

    def _execute(self, command: SwitchCommand) -> None:
        operation = retry(lambda: self._operations.read(command.operation))
        if operation is None or operation.state.terminal:
            logger.warning("operation_unknown_or_ended", extra={"operation": command.operation})
            return
        progress = OperationProgress(self._operations, replace(operation, memory_before=self._models.memory_used()))
        end = self._outcome(command, progress)
        try:
            self._announce()  # before the end is published, because clients may send the next command at once
        except RedisError as error:
            logger.debug("host_not_announced", extra={"reason": str(error)})  # announced again within a second
        progress.publish(**end)

    def _outcome(self, command: SwitchCommand, progress: OperationProgress) -> dict[str, Any]:
        """Carry out a command; return the final fields of its operation."""
        try:
            self._load(command, progress) if command.kind == "load" else self._unload(command, progress)
        except Refused as refused:
            return {"state": OperationState.FAILED, "error_code": refused.code, "error_message": str(refused)}
        except RedisError:
            raise
        except Exception:
            logger.exception("operation_failed", extra={"operation": command.operation})
            message = "The operation failed."
            return {"state": OperationState.FAILED, "error_code": "internal", "error_message": message}
        return {"state": OperationState.SUCCEEDED, "progress": 1.0, "memory_after": self._models.memory_used()}

    def _load(self, command: SwitchCommand, progress: OperationProgress) -> None:
        model = self._catalog_model(command.model)
        if model is None:
            raise Refused("model_not_found", f"This worker's catalog has no model {command.model}.")
        loaded = self._worker(model.id)
        if loaded is not None:
            self._keep(loaded, command, progress)
            return
        to_unload = self._to_unload(model, everything=command.replace)
        fits = self._models.fits(model, self._models.workers)
        if fits and command.replace and to_unload:
            # The jobs of models that are unloaded anyway must not keep their memory from this one.
            fits = self._models.free_memory(model.measure())
        if not fits:
            self._close(to_unload, progress)
        try:
            self._load_and_serve(model, progress, pinned=bool(command.pin))
        except Refused:
            if not fits:
                self._load_again(to_unload)
            raise
        if fits:
            self._close(to_unload, progress)

    def _catalog_model(self, name: str) -> CatalogModel | None:
        """Return a model of the catalog, which may have been added since it was read."""
        model = self._models.catalog.resolve(name)
        if model is None:
            self._refresh_catalog()
            model = self._models.catalog.resolve(name)
        return model

    def _keep(self, loaded: ModelWorker, command: SwitchCommand, progress: OperationProgress) -> None:
        """Handle a command for a model that is loaded already."""
        if command.pin is not None:
            loaded.pinned = command.pin
        if command.replace:
            self._close([each for each in self._models.workers if each is not loaded and not each.pinned], progress)

    def _unload(self, command: SwitchCommand, progress: OperationProgress) -> None:
        model = self._models.catalog.resolve(command.model)
        worker = self._worker(model.id if model else command.model)
        if worker is None:
            raise Refused("model_not_loaded", f"This worker has not loaded {command.model}.")
        self._close([worker], progress)

    def _worker(self, model: str) -> ModelWorker | None:
        return next((worker for worker in self._models.workers if worker.model.id == model), None)

    def _to_unload(self, model: CatalogModel, *, everything: bool) -> list[ModelWorker]:
        """Return the workers to unload for a model, the least recently used first.

        Raises:
            Refused: the model does not fit even without them.
        """
        unpinned = sorted((worker for worker in self._models.workers if not worker.pinned), key=_last_used)
        to_unload = unpinned if everything else []
        while not self._models.fits(model, self._without(to_unload)) and len(to_unload) < len(unpinned):
            to_unload = unpinned[: len(to_unload) + 1]
        staying = self._without(to_unload)
        if not self._models.fits(model, staying):
            raise Refused("not_enough_memory", self._memory_message(model, staying))
        return to_unload

    def _without(self, workers: Sequence[ModelWorker]) -> list[ModelWorker]:
        return [worker for worker in self._models.workers if worker not in workers]

    def _memory_message(self, model: CatalogModel, staying: Sequence[ModelWorker]) -> str:
        needed, limit = model.measure() / 2**20, self._models.memory_limit / 2**20
        pinned = ", ".join(worker.model.id for worker in staying)
        others = f" in addition to {pinned}, which cannot be unloaded" if pinned else ""
        return (
            f"{model.id} needs {needed:,.0f} MiB{others}. This worker's limit is {limit:,.0f} MiB "
            f"(MEMORY_LIMIT_BYTES), of which {MIN_CACHE_SHARE:.0%} are reserved for jobs."
        )

    def _close(self, workers: Iterable[ModelWorker], progress: OperationProgress) -> None:
        for worker in workers:
            progress.publish(OperationState.DRAINING)
            self._models.close(worker)
            progress.add_unloaded(worker.model.id)

    def _load_and_serve(self, model: CatalogModel, progress: OperationProgress, *, pinned: bool) -> None:
        """Load a model, publish the progress, and claim its jobs.

        Raises:
            Refused: the model does not load; its memory is free again.
        """
        if not self._models.free_memory(model.measure()):
            self._models.divide_memory()
            raise Refused("not_enough_memory", f"Running jobs use the memory that {model.id} needs. Try again later.")
        worker = self._models.open(model, pinned=pinned)
        while not worker.core.loaded.done():
            progress.publish(OperationState.LOADING, progress=round(worker.core.load_progress, 3))
            _wait_loaded(worker, PUBLISH_EVERY_S)
        error = worker.core.loaded.exception() or self._serving_error(worker)
        if error is not None:
            logger.error("model_not_loaded", extra={"model": model.id, "reason": str(error)})
            self._models.close(worker)
            reason = first_line(error).replace(str(model.path), model.path.name)  # clients must not see paths
            raise Refused("load_failed", f"{model.id} does not load: {reason}")

    def _serving_error(self, worker: ModelWorker) -> Exception | None:
        try:
            self._models.serve(worker)
        except Exception as error:  # noqa: BLE001 - such as a file that was deleted meanwhile
            return error
        return None

    def _load_again(self, unloaded: Iterable[ModelWorker]) -> None:
        """Reload the models that were unloaded for a model that then failed to load."""
        for worker in unloaded:
            again = self._models.open(worker.model, pinned=worker.pinned)
            error = again.core.loaded.exception()
            if error is None:
                self._models.serve(again)
            else:
                logger.error("model_not_loaded_again", extra={"model": worker.model.id, "reason": str(error)})
                self._models.close(again)


def _last_used(worker: ModelWorker) -> tuple[bool, float]:
    """Sort key. A model with jobs is in use, however long ago they came."""
    return not worker.core.idle, worker.core.used_at


def _wait_loaded(worker: ModelWorker, seconds: float) -> None:
    until = time.monotonic() + seconds
    while not worker.core.loaded.done() and time.monotonic() < until:
        time.sleep(0.01)
