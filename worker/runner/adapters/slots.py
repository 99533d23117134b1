"""The adapters in memory, and the rows that use them or wait for them.

An adapter is loaded when a row needs it, a few layers per step, so that other rows decode meanwhile. It replaces the
least recently used adapter that no row uses. The scheduler admits no more different adapters than there are
slots, so each row gets one.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Self

import mlx.core as mx

from shared.models.folder import ModelError
from worker.runner.adapters.fit import Fitted, ModelLayers
from worker.runner.adapters.table import Table
from worker.runner.base import AdapterFailed, Row
from worker.runner.memory import is_out_of_memory
from worker.runner.prefix.cache import owner_with_adapter

logger = logging.getLogger(__name__)

PIECE_BYTES: Final = 8 * 2**20
"""Bytes of tables that are written in one step."""
_READ_BYTES: Final = 2**20
_END: Final = object()


@dataclass(slots=True)
class _Loading:
    """An adapter that is being loaded.

    Attributes:
        read: reads the file once, in another thread, so that the engine thread does not wait for the disk.
        pieces: writes the tables; None until the file has been read.
    """

    name: str
    slot: int
    read: Future[None]
    pieces: Iterator[None] | None = None


class AdapterSlots:
    """The adapters of one model.

    Args:
        layers: the model's layers.
        tables: the tables of the layers that adapters change, by layer.
        fitted: the adapters that fit, by name.
        problems: why the other adapters cannot be used, by name.
        slots: number of adapters that fit into memory at the same time.
        max_rank: see `read_adapter`.
    """

    def __init__(
        self,
        layers: ModelLayers,
        tables: Mapping[str, Table],
        fitted: Mapping[str, Fitted],
        problems: Mapping[str, str],
        slots: int,
        max_rank: int,
    ) -> None:
        self.slots = slots
        self._layers = layers
        self._tables = tables
        self._fitted = dict(fitted)
        self._problems = problems
        self._max_rank = max_rank
        self._loaded: dict[str, int] = {}  # slot by name, least recently used first
        self._rows: dict[int, Row] = {}  # rows with an adapter, by uid
        self._waiting: dict[int, Row] = {}
        self._failed: dict[int, Exception] = {}
        self._loading: _Loading | None = None
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="adapter")
        self._loads = self._evictions = 0

    @classmethod
    def empty(cls) -> Self:
        """Return the slots of a model without adapters: none."""
        return cls(ModelLayers({}, {}), {}, {}, {}, 0, 0)

    @property
    def announced(self) -> dict[str, str]:
        """All adapters by name, with why they cannot be used; empty if they can."""
        return {**dict.fromkeys(self._fitted, ""), **self._problems}

    @property
    def nbytes(self) -> int:
        """Bytes of the tables."""
        return sum(array.nbytes for table in self._tables.values() for array in table.arrays)

    def enter(self, row: Row) -> Row | None:
        """Add a row. Returns it with the slot of its adapter, or None if it must wait for the adapter."""
        name = row.request.adapter
        if name is None:
            return row
        self._rows[row.uid] = row
        if name in self._loaded:
            return self._placed(row, name)
        if name not in self._fitted:
            self._failed[row.uid] = AdapterFailed(self._problems.get(name, "the worker does not have it"))
            return None
        self._waiting[row.uid] = row
        return None

    def remove(self, uids: Collection[int]) -> None:
        """Remove rows. Unknown uids are ignored."""
        for uid in uids:
            self._rows.pop(uid, None)
            self._waiting.pop(uid, None)
            self._failed.pop(uid, None)

    def clear(self) -> None:
        """Remove all rows."""
        self._rows.clear()
        self._waiting.clear()
        self._failed.clear()

    def ready(self) -> list[Row]:
        """Return the rows whose adapter has been loaded since the last call."""
        ready = [row for row in self._waiting.values() if row.request.adapter in self._loaded]
        for row in ready:
            del self._waiting[row.uid]
        return [self._placed(row, row.request.adapter or "") for row in ready]

    def take_failures(self) -> list[tuple[int, Exception]]:
        """Return (uid, error) of the rows whose adapter could not be loaded since the last call."""
        failed, self._failed = self._failed, {}
        return list(failed.items())

    def next_read(self) -> Future[None] | None:
        """Return the reading of the file that the next row waits for; None if there is none or it is done."""
        return self._loading.read if self._loading and not self._loading.pieces else None

    def advance(self) -> None:
        """Load a piece of the next adapter that a row waits for."""
        if self._loading is None and (name := self._next()) is not None:
            self._begin(name)
        if (loading := self._loading) is None or not loading.read.done():
            return
        try:
            self._load_piece(loading)
        except Exception as error:
            self._loading = None  # the slot counts as empty, so the next load begins with the first piece
            if is_out_of_memory(error):
                raise
            logger.error("adapter_not_loaded", extra={"adapter": loading.name, "reason": str(error)})
            self._fail(loading.name, error)

    def close(self) -> None:
        """Stop."""
        self._reader.shutdown(wait=False, cancel_futures=True)

    def stats(self) -> dict[str, float]:
        """Gauges and counters for `/metrics`."""
        return {
            "adapters_loaded": len(self._loaded),
            "adapter_slots": self.slots,
            "adapter_bytes": self.nbytes,
            "adapter_loads_total": self._loads,
            "adapter_evictions_total": self._evictions,
        }

    def _placed(self, row: Row, name: str) -> Row:
        slot = self._loaded[name] = self._loaded.pop(name)  # the most recently used is the last
        owner = None if row.owner is None else owner_with_adapter(row.owner, self._fitted[name].digest)
        return replace(row, adapter_slot=slot, owner=owner)

    def _next(self) -> str | None:
        return next((row.request.adapter for row in self._waiting.values()), None)

    def _begin(self, name: str) -> None:
        """Choose a slot for an adapter, and start to read its file."""
        slot = self._free_slot()
        if slot is not None:
            read = self._reader.submit(_read_once, self._fitted[name].adapter.weights)
            self._loading = _Loading(name, slot, read)

    def _free_slot(self) -> int | None:
        """Return an empty slot, or that of the least recently used adapter that no row uses; None if there is none."""
        used = set(self._loaded.values())
        if len(used) < self.slots:
            return next(slot for slot in range(1, self.slots + 1) if slot not in used)
        in_use = {row.request.adapter for row in self._rows.values()}
        name = next((each for each in self._loaded if each not in in_use), None)
        if name is None:
            return None
        self._evictions += 1
        return self._loaded.pop(name)

    def _load_piece(self, loading: _Loading) -> None:
        if loading.pieces is None:
            loading.read.result()
            loading.pieces = self._pieces(self._checked(loading.name), loading.slot)
        if next(loading.pieces, _END) is _END:
            self._loaded[loading.name] = loading.slot
            self._loading = None
            self._loads += 1

    def _checked(self, name: str) -> Fitted:
        """Return the adapter as it is now on disk; its files may have changed since the model was loaded."""
        before = self._fitted[name]
        now = self._layers.fit(name, before.adapter.folder, self._max_rank)
        if now.digest != before.digest:
            fits = all(
                path in self._tables and layer.rank <= self._tables[path].shape.rank
                for path, layer in now.layers.items()
            )
            if not fits:
                raise ModelError("it has changed and needs more memory than before; load the model again")
            self._fitted[name] = now
        return now

    def _pieces(self, fitted: Fitted, slot: int) -> Iterator[None]:
        """Write an adapter into the tables; yields after each piece."""
        arrays, pending_bytes = list[mx.array](), 0
        for table, a, b in self._matrices(fitted):
            table.write(slot, a, b)
            arrays += table.arrays
            pending_bytes += sum(array.nbytes for array in table.arrays)
            if pending_bytes >= PIECE_BYTES:
                mx.eval(arrays)
                arrays, pending_bytes = [], 0
                yield
        mx.eval(arrays)

    def _matrices(self, fitted: Fitted) -> Iterator[tuple[Table, mx.array | None, mx.array | None]]:
        """Yield the matrices for each table. Those of layers that the adapter does not change are None."""
        weights: dict[str, mx.array] = mx.load(str(fitted.adapter.weights))  # type: ignore[assignment]
        for path, table in self._tables.items():
            layer = fitted.layers.get(path)
            if layer is None:
                yield table, None, None
                continue
            a, b = weights[layer.a], weights[layer.b]
            if fitted.adapter.transposed:
                a, b = a.T, b.T
            if layer.per_expert:
                a, b = a.swapaxes(1, 2), b.swapaxes(1, 2)
            else:
                a, b = a[None], b[None]
            yield table, a, layer.scale * b

    def _fail(self, name: str, error: Exception) -> None:
        """Fail the rows that wait for an adapter."""
        reason = str(error) if isinstance(error, ModelError) else "its weights cannot be read"
        if isinstance(error, OSError) and error.strerror:
            reason = f"its files cannot be read: {error.strerror}"
        failed = [row.uid for row in self._waiting.values() if row.request.adapter == name]
        for uid in failed:
            del self._waiting[uid]
            self._failed[uid] = AdapterFailed(reason)


def _read_once(path: Path) -> None:
    """Read a file once, so that it is in the page cache."""
    buffer = bytearray(_READ_BYTES)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
