"""Loading and unloading models on a running worker, one operation after another, in a thread of its own.

A model is loaded beside those that are warm where the memory suffices, else in the place of the least recently used
ones that are not pinned: those drain first. What fails leaves, or puts back, what was there before.
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
from worker.model_worker import Desk
from worker.models.load import first_line

logger = logging.getLogger(__name__)

TOLD_EVERY_S: Final = 0.5
PATIENCE_S: Final = 120.0
"""So long the end of an operation waits for a Redis that is away; then it counts as lost."""

T = TypeVar("T")


class Refused(Exception):
    """Why an operation cannot be done; `code` is stable."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Models(Protocol):
    """What the worker process can do with its models; see `worker.app`."""

    catalog: Catalog
    memory_limit: int

    @property
    def desks(self) -> Sequence[Desk]:
        """Those there are."""
        ...

    def open_desk(self, model: CatalogModel, *, pinned: bool = False) -> Desk:
        """Begin to load a model."""
        ...

    def consume(self, desk: Desk) -> None:
        """Take its jobs from now on: it is warm."""
        ...

    def close_desk(self, desk: Desk) -> None:
        """Drain it and let go of it; returns when that is done."""
        ...

    def make_room(self, coming: int) -> bool:
        """Have the caches of those there are give way to so many bytes of weights; whether they do in time."""
        ...

    def divide_memory(self) -> None:
        """Let caches have what the models leave."""
        ...

    def memory_used(self) -> int:
        """Bytes that the model library holds in use."""
        ...

    def announce(self) -> None:
        """Have others know which models there are now."""
        ...


@dataclass(frozen=True, slots=True)
class Order:
    """What was asked for.

    Attributes:
        operation: its id.
        replace: whether what is warm goes, unless it is pinned, also where there is memory for both.
    """

    operation: str
    kind: str
    model: str
    replace: bool = False
    pin: bool = False


class Switcher(threading.Thread):
    """Does one order after another.

    Args:
        tell: has others told soon what is in hand.
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
        """Ids of the operations under way and in line: they are not lost."""
        return self._in_hand

    def put(self, order: Order) -> None:
        """Have it done; that it is in line is told at once, for what comes before may take long."""
        with self._lock:
            if order.operation in self._in_hand:
                return  # told twice
            self._in_hand = (*self._in_hand, order.operation)
        self._tell()
        try:
            operation = self._operations.read(order.operation)
            if operation and not operation.state.terminal:
                self._operations.put(replace(operation, state=OperationState.WAITING))
        except RedisError as error:
            logger.warning("that an operation is in line cannot be told: %s", error)
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
                logger.warning("an operation is not told: Redis is away: %s", error)
            except Exception:  # of one that cannot be read, say: those in line have their turn all the same
                logger.exception("an operation is not told")
            with self._lock:
                self._in_hand = tuple(name for name in self._in_hand if name != order.operation)

    def fits(self, model: CatalogModel, beside: Iterable[Desk]) -> bool:
        """Whether it has place beside these, and their jobs some, too."""
        taken = sum(desk.weights_bytes for desk in beside)
        return model.measure() + taken <= (1 - LEAST_CACHE) * self._models.memory_limit

    def _do(self, order: Order) -> None:
        operation = _patiently(lambda: self._operations.read(order.operation))
        if operation is None or operation.state.terminal:
            logger.warning("an operation that nobody knows, or that has ended: %s", order.operation)
            return
        teller = _Teller(self._operations, replace(operation, memory_before=self._models.memory_used()))
        end: dict[str, Any]
        try:
            self._load(order, teller) if order.kind == "load" else self._unload(order, teller)
        except Refused as refused:
            end = {"state": OperationState.FAILED, "error_code": refused.code, "error_message": str(refused)}
        except RedisError:
            raise
        except Exception:
            logger.exception("the operation failed")
            end = {"state": OperationState.FAILED, "error_code": "internal", "error_message": "The operation failed."}
        else:
            end = {"state": OperationState.SUCCEEDED, "progress": 1.0, "memory_after": self._models.memory_used()}
        with suppress(RedisError):  # or they are told with the next sign of life
            self._models.announce()  # before the end is: whoever sees that may ask for the next thing at once
        teller.tell(**end)

    def _load(self, order: Order, teller: _Teller) -> None:
        model = self._models.catalog.resolve(order.model)
        if model is None:
            raise Refused("model_not_found", f"This worker's catalog has no model {order.model}.")
        warm = self._desk(model.id)
        if warm is not None:
            warm.pinned = warm.pinned or order.pin
            others = [desk for desk in self._models.desks if desk is not warm and not desk.pinned]
            self._close(others if order.replace else [], teller)
            return
        going = self._to_make_place(model, everything=order.replace)
        fits_beside = self.fits(model, self._models.desks)
        if fits_beside and order.replace and going:  # jobs of those that go anyway hold nothing up
            fits_beside = self._models.make_room(model.measure())
        if not fits_beside:  # it cannot be tried before they have gone
            self._close(going, teller)
        try:
            self._warm_up(model, teller, pinned=order.pin)
        except Refused:
            if not fits_beside:
                self._put_back(going)
            raise
        if fits_beside:
            self._close(going, teller)

    def _unload(self, order: Order, teller: _Teller) -> None:
        model = self._models.catalog.resolve(order.model)
        desk = self._desk(model.id if model else order.model)
        if desk is None:
            raise Refused("model_not_loaded", f"This worker does not have {order.model}.")
        self._close([desk], teller)

    def _desk(self, model: str) -> Desk | None:
        return next((desk for desk in self._models.desks if desk.model.id == model), None)

    def _to_make_place(self, model: CatalogModel, *, everything: bool) -> list[Desk]:
        """The desks that go, the least recently used first.

        Raises:
            Refused: it would not be enough.
        """
        may_go = sorted((desk for desk in self._models.desks if not desk.pinned), key=_last_used)
        if everything:
            going = may_go
        else:
            going = []
            while not self.fits(model, [desk for desk in self._models.desks if desk not in going]):
                if len(going) == len(may_go):
                    break
                going.append(may_go[len(going)])
        stays = [desk for desk in self._models.desks if desk not in going]
        if not self.fits(model, stays):
            pinned = [desk.model.id for desk in stays]
            beside = f" beside {', '.join(pinned)}, which stay" if pinned else ""
            needed, limit = model.measure() / 2**20, self._models.memory_limit / 2**20
            told = f"{model.id} needs {needed:,.0f} MiB{beside}; this worker may take {limit:,.0f} MiB in all"
            told += f", and {LEAST_CACHE:.0%} of that are for jobs."
            raise Refused("not_enough_memory", told)
        return going

    def _close(self, desks: Iterable[Desk], teller: _Teller) -> None:
        for desk in desks:
            teller.tell(OperationState.DRAINING)
            self._models.close_desk(desk)
            teller.unloaded(desk.model.id)

    def _warm_up(self, model: CatalogModel, teller: _Teller, *, pinned: bool) -> None:
        """Load it, telling how far that is.

        Raises:
            Refused: it does not load; nothing is left of it.
        """
        if not self._models.make_room(model.measure()):
            self._models.divide_memory()
            raise Refused("not_enough_memory", f"Running jobs need the memory that {model.id} would take.")
        desk = self._models.open_desk(model, pinned=pinned)
        while not desk.batch.loaded.done():
            teller.tell(OperationState.LOADING, progress=round(desk.batch.load_progress, 3))
            _wait(desk, TOLD_EVERY_S)
        error = desk.batch.loaded.exception()
        if error is None:
            try:
                self._models.consume(desk)
            except Exception as unserved:  # noqa: BLE001 - it is loaded, and of no use
                error = unserved
        if error is not None:
            logger.error("%s does not load: %s", model.id, error)
            self._models.close_desk(desk)
            reason = first_line(error).replace(str(model.path), model.path.name)  # paths are this machine's business
            raise Refused("load_failed", f"{model.id} does not load: {reason}")

    def _put_back(self, gone: Iterable[Desk]) -> None:
        """Load again what had to go in vain."""
        for desk in gone:
            again = self._models.open_desk(desk.model, pinned=desk.pinned)
            if again.batch.loaded.exception() is None:
                self._models.consume(again)
            else:
                logger.error("%s cannot be put back: %s", desk.model.id, again.batch.loaded.exception())
                self._models.close_desk(again)


class _Teller:
    """Writes how an operation goes; that nobody can read it for a while does not end it."""

    def __init__(self, operations: Operations, operation: Operation) -> None:
        self._operations = operations
        self._operation = operation

    def tell(self, state: OperationState, **more: object) -> None:
        self._operation = replace(self._operation, state=state, **more)  # type: ignore[arg-type]
        if state.terminal:
            _patiently(lambda: self._operations.put(self._operation))
            return
        try:
            self._operation = self._operations.put(self._operation)
        except RedisError as error:
            logger.warning("how far an operation is cannot be told: %s", error)

    def unloaded(self, model: str) -> None:
        self._operation = replace(self._operation, unloaded=(*self._operation.unloaded, model))


def _last_used(desk: Desk) -> tuple[bool, float]:
    """What has jobs is in use, however long ago they came."""
    return not desk.batch.idle, desk.batch.used_at


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
            time.sleep(TOLD_EVERY_S)


def _wait(desk: Desk, seconds: float) -> None:
    until = time.monotonic() + seconds
    while not desk.batch.loaded.done() and time.monotonic() < until:
        time.sleep(0.01)
