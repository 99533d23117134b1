"""Loading and unloading models on a running worker, one operation after another, in a thread of its own.

A model is loaded beside the loaded ones where there is enough memory, else in the place of the least recently used
ones that are not pinned: those drain first. If loading fails, the previous models stay loaded or are loaded again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from queue import SimpleQueue
from typing import Any, Final, Protocol, TypeVar

from redis import RedisError

from shared.models.catalog import Catalog, CatalogModel
from shared.models.operations import Operation, Operations, OperationState
from shared.models.registry import LEAST_CACHE
from shared.queue.redis import passes
from worker.model_worker import ModelWorker
from worker.models.load import first_line

logger = logging.getLogger(__name__)

PUBLISH_EVERY_S: Final = 0.5
"""Time between two publications of an operation's progress, and between two tries while Redis is away."""
PATIENCE_S: Final = 120.0
"""Longest time for which the end of an operation is kept while Redis is away."""

T = TypeVar("T")


class Refused(Exception):
    """An operation cannot be done; `code` is stable."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Models(Protocol):
    """What the worker process can do with its models; see `worker.app`."""

    catalog: Catalog
    memory_limit: int

    @property
    def workers(self) -> Sequence[ModelWorker]:
        """The workers of this process."""
        ...

    def open_worker(self, model: CatalogModel, *, pinned: bool = False) -> ModelWorker:
        """Begin to load a model."""
        ...

    def consume(self, worker: ModelWorker) -> None:
        """Claim its jobs from now on: it is loaded."""
        ...

    def close_worker(self, worker: ModelWorker) -> None:
        """Drain and unload it; returns when that is done."""
        ...

    def make_room(self, coming: int) -> bool:
        """Shrink the caches of the loaded models by `coming` bytes; whether that succeeds in time."""
        ...

    def divide_memory(self) -> None:
        """Divide the memory that the models leave among their caches."""
        ...

    def memory_used(self) -> int:
        """Bytes in use by the model library."""
        ...

    def announce(self) -> None:
        """Announce which models this process has now."""
        ...


@dataclass(frozen=True, slots=True)
class Order:
    """What was asked for.

    Attributes:
        operation: its id.
        replace: whether the loaded models are unloaded, unless pinned, even where there is memory for all.
    """

    operation: str
    kind: str
    model: str
    replace: bool = False
    pin: bool = False


class Switcher(threading.Thread):
    """Executes one order after another.

    Args:
        tell: announces `in_hand` soon.
    """

    def __init__(self, models: Models, operations: Operations, tell: Callable[[], object] = lambda: None) -> None:
        super().__init__(name="switcher", daemon=True)
        self._models = models
        self._operations = operations
        self._tell = tell
        self._orders: SimpleQueue[Order | None] = SimpleQueue()
        self._in_hand: tuple[str, ...] = ()
        self._lock = threading.Lock()

    @property
    def in_hand(self) -> tuple[str, ...]:
        """Ids of the operations that are queued or under way here."""
        return self._in_hand

    def put(self, order: Order) -> None:
        """Queue an order; its operation says so at once, because earlier ones may take long."""
        with self._lock:
            if order.operation in self._in_hand:
                return  # the order came twice
            self._in_hand = (*self._in_hand, order.operation)
        self._tell()
        try:
            operation = self._operations.read(order.operation)
            if operation and not operation.state.terminal:
                self._operations.put(replace(operation, state=OperationState.WAITING))
        except RedisError as error:
            logger.warning("operation_not_published", extra={"operation": order.operation, "reason": str(error)})
        self._orders.put(order)

    def close(self) -> None:
        """End the thread after what it is doing."""
        self._orders.put(None)

    def run(self) -> None:
        """Until closed."""
        while (order := self._orders.get()) is not None:
            try:
                self._do(order)
            except RedisError as error:
                logger.warning("operation_not_published", extra={"operation": order.operation, "reason": str(error)})
            except Exception:  # such as one that cannot be read: the others in the queue have their turn
                logger.exception("operation_not_published", extra={"operation": order.operation})
            with self._lock:
                self._in_hand = tuple(name for name in self._in_hand if name != order.operation)

    def fits(self, model: CatalogModel, beside: Iterable[ModelWorker]) -> bool:
        """Whether it fits beside these workers, with some memory left for their jobs."""
        taken = sum(worker.weights_bytes for worker in beside)
        return model.measure() + taken <= (1 - LEAST_CACHE) * self._models.memory_limit

    def _do(self, order: Order) -> None:
        operation = _patiently(lambda: self._operations.read(order.operation))
        if operation is None or operation.state.terminal:
            logger.warning("operation_unknown_or_ended", extra={"operation": order.operation})
            return
        progress = _Progress(self._operations, replace(operation, memory_before=self._models.memory_used()))
        end: dict[str, Any]
        try:
            self._load(order, progress) if order.kind == "load" else self._unload(order, progress)
        except Refused as refused:
            end = {"state": OperationState.FAILED, "error_code": refused.code, "error_message": str(refused)}
        except RedisError:
            raise
        except Exception:
            logger.exception("operation_failed", extra={"operation": order.operation})
            end = {"state": OperationState.FAILED, "error_code": "internal", "error_message": "The operation failed."}
        else:
            end = {"state": OperationState.SUCCEEDED, "progress": 1.0, "memory_after": self._models.memory_used()}
        with suppress(RedisError):  # then the next announcement has them
            self._models.announce()  # before the end is published: clients may send the next order at once
        progress.publish(**end)

    def _load(self, order: Order, progress: _Progress) -> None:
        model = self._models.catalog.resolve(order.model)
        if model is None:
            raise Refused("model_not_found", f"This worker's catalog has no model {order.model}.")
        warm = self._worker(model.id)
        if warm is not None:
            warm.pinned = warm.pinned or order.pin
            others = [worker for worker in self._models.workers if worker is not warm and not worker.pinned]
            self._close(others if order.replace else [], progress)
            return
        going = self._to_unload(model, everything=order.replace)
        fits_beside = self.fits(model, self._models.workers)
        if fits_beside and order.replace and going:  # running jobs of models that are unloaded anyway must not block
            fits_beside = self._models.make_room(model.measure())
        if not fits_beside:  # it cannot be tried before they have gone
            self._close(going, progress)
        try:
            self._warm_up(model, progress, pinned=order.pin)
        except Refused:
            if not fits_beside:
                self._put_back(going)
            raise
        if fits_beside:
            self._close(going, progress)

    def _unload(self, order: Order, progress: _Progress) -> None:
        model = self._models.catalog.resolve(order.model)
        worker = self._worker(model.id if model else order.model)
        if worker is None:
            raise Refused("model_not_loaded", f"This worker has not loaded {order.model}.")
        self._close([worker], progress)

    def _worker(self, model: str) -> ModelWorker | None:
        return next((worker for worker in self._models.workers if worker.model.id == model), None)

    def _to_unload(self, model: CatalogModel, *, everything: bool) -> list[ModelWorker]:
        """The workers that go, the least recently used first.

        Raises:
            Refused: it would not be enough.
        """
        may_go = sorted((worker for worker in self._models.workers if not worker.pinned), key=_last_used)
        if everything:
            going = may_go
        else:
            going = []
            while not self.fits(model, [worker for worker in self._models.workers if worker not in going]):
                if len(going) == len(may_go):
                    break
                going.append(may_go[len(going)])
        stays = [worker for worker in self._models.workers if worker not in going]
        if not self.fits(model, stays):
            pinned = [worker.model.id for worker in stays]
            beside = f" beside {', '.join(pinned)}, which stay loaded" if pinned else ""
            needed, limit = model.measure() / 2**20, self._models.memory_limit / 2**20
            message = f"{model.id} needs {needed:,.0f} MiB{beside}; this worker may use {limit:,.0f} MiB in all"
            message += f" (MEMORY_LIMIT_BYTES), and {LEAST_CACHE:.0%} of that are kept for jobs."
            raise Refused("not_enough_memory", message)
        return going

    def _close(self, workers: Iterable[ModelWorker], progress: _Progress) -> None:
        for worker in workers:
            progress.publish(OperationState.DRAINING)
            self._models.close_worker(worker)
            progress.unloaded(worker.model.id)

    def _warm_up(self, model: CatalogModel, progress: _Progress, *, pinned: bool) -> None:
        """Load it, and publish the progress.

        Raises:
            Refused: it does not load; its memory is free again.
        """
        if not self._models.make_room(model.measure()):
            self._models.divide_memory()
            raise Refused("not_enough_memory", f"Running jobs use the memory that {model.id} needs. Try again later.")
        worker = self._models.open_worker(model, pinned=pinned)
        while not worker.core.loaded.done():
            progress.publish(OperationState.LOADING, progress=round(worker.core.load_progress, 3))
            _wait(worker, PUBLISH_EVERY_S)
        error = worker.core.loaded.exception()
        if error is None:
            try:
                self._models.consume(worker)
            except Exception as unserved:  # noqa: BLE001 - it is loaded and cannot be served
                error = unserved
        if error is not None:
            logger.error("model_not_loaded", extra={"model": model.id, "reason": str(error)})
            self._models.close_worker(worker)
            reason = first_line(error).replace(str(model.path), model.path.name)  # paths are this machine's business
            raise Refused("load_failed", f"{model.id} does not load: {reason}")

    def _put_back(self, gone: Iterable[ModelWorker]) -> None:
        """Load the models again that were unloaded in vain."""
        for worker in gone:
            again = self._models.open_worker(worker.model, pinned=worker.pinned)
            if again.core.loaded.exception() is None:
                self._models.consume(again)
            else:
                logger.error(
                    "model_not_loaded_again",
                    extra={"model": worker.model.id, "reason": str(again.core.loaded.exception())},
                )
                self._models.close_worker(again)


class _Progress:
    """Publishes the progress of an operation, which continues while Redis is away."""

    def __init__(self, operations: Operations, operation: Operation) -> None:
        self._operations = operations
        self._operation = operation

    def publish(self, state: OperationState, **more: object) -> None:
        self._operation = replace(self._operation, state=state, **more)  # type: ignore[arg-type]
        if state.terminal:
            _patiently(lambda: self._operations.put(self._operation))
            return
        try:
            self._operation = self._operations.put(self._operation)
        except RedisError as error:
            logger.warning("operation_not_published", extra={"operation": self._operation.id, "reason": str(error)})

    def unloaded(self, model: str) -> None:
        self._operation = replace(self._operation, unloaded=(*self._operation.unloaded, model))


def _last_used(worker: ModelWorker) -> tuple[bool, float]:
    """What has jobs is in use, however long ago they came."""
    return not worker.core.idle, worker.core.used_at


def _patiently(call: Callable[[], T]) -> T:
    """Call again and again while Redis is away, for a while.

    Raises:
        redis.RedisError: for too long.
    """
    until = time.monotonic() + PATIENCE_S
    while True:
        try:
            return call()
        except RedisError as error:
            if not passes(error) or time.monotonic() > until:
                raise
            time.sleep(PUBLISH_EVERY_S)


def _wait(worker: ModelWorker, seconds: float) -> None:
    until = time.monotonic() + seconds
    while not worker.core.loaded.done() and time.monotonic() < until:
        time.sleep(0.01)
