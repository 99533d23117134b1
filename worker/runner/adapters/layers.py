"""Layers that add a row's adapter to their output. Rows with different adapters share a pass.

A layer stacks the matrices of all adapters in memory in a table, [slots, inputs, rank] and [slots, rank, outputs],
padded to the largest rank. In a pass, each row selects a slot, and two batched products compute what the adapters add.
Slot 0 is empty: its matrices are zero. A pass in which no row has an adapter runs the original layers and nothing else.

A layer gets a subclass of its own class, so its weights and their names stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any, Final, NamedTuple

import mlx.core as mx
from mlx import nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchGLU, SwitchLinear, SwitchMLP

from worker.runner.adapters.table import Table

LINEAR: Final = (nn.Linear, nn.QuantizedLinear)  # type: ignore[attr-defined]  # MLX has no types for them
EMBEDDINGS: Final = (nn.Embedding, nn.QuantizedEmbedding)  # type: ignore[attr-defined]
EXPERTS: Final = (SwitchLinear, QuantizedSwitchLinear)
EXPERT_GROUPS: Final = (SwitchGLU, SwitchMLP)
"""Modules that call the layers of their experts, if there are many tokens, in another order than that of the rows."""


class _Pairs(NamedTuple):
    """The slot of each pair of a token and one of its experts, in the order of the rows and in that of the experts."""

    by_row: mx.array
    by_expert: mx.array


_slots: ContextVar[mx.array | None] = ContextVar("adapter_slots", default=None)
_pairs: ContextVar[_Pairs | None] = ContextVar("adapter_pairs", default=None)


@contextmanager
def applied(slots: mx.array | None) -> Iterator[None]:
    """Apply adapters to the passes that are built inside the block.

    Args:
        slots: the adapter slot of each row of the pass; None: no row has an adapter.
    """
    token = _slots.set(slots)
    try:
        yield
    finally:
        _slots.reset(token)


class _Linear:
    adapters: Table

    def __call__(self, x: mx.array) -> mx.array:
        y: mx.array = super().__call__(x)  # type: ignore[misc]  # of the layer's own class
        slots = _slots.get()
        return y if slots is None else y + self.adapters.product(x, slots).astype(x.dtype)


class _Embedding:
    adapters: Table

    def __call__(self, ids: mx.array) -> mx.array:
        y: mx.array = super().__call__(ids)  # type: ignore[misc]
        slots = _slots.get()
        return y if slots is None else y + self.adapters.lookup(ids, slots).astype(y.dtype)

    def as_linear(self, x: mx.array) -> mx.array:
        y: mx.array = super().as_linear(x)  # type: ignore[misc]
        slots = _slots.get()
        return y if slots is None else y + self.adapters.transposed_product(x, slots).astype(x.dtype)


class _Experts:
    adapters: Table

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        y: mx.array = super().__call__(x, indices, sorted_indices=sorted_indices)  # type: ignore[misc]
        pairs = _pairs.get()
        if pairs is None:
            return y
        slots = pairs.by_expert if sorted_indices else pairs.by_row
        return y + self.adapters.expert_product(x, slots, indices).astype(x.dtype)


class _ExpertGroup:
    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        slots = _slots.get()
        token = _pairs.set(None if slots is None else _pairs_of(slots, indices))
        try:
            y: mx.array = super().__call__(x, indices)  # type: ignore[misc]
            return y
        finally:
            _pairs.reset(token)


def _pairs_of(slots: mx.array, indices: mx.array) -> _Pairs:
    each = mx.repeat(slots, indices.size // slots.size)
    # mlx-lm sorts the pairs by expert in the same way.
    return _Pairs(each.reshape(indices.shape), each[mx.argsort(indices.flatten())])


_KINDS: Final = ((LINEAR, _Linear), (EMBEDDINGS, _Embedding), (EXPERTS, _Experts), (EXPERT_GROUPS, _ExpertGroup))


def adapt(module: Any, table: Table | None = None) -> None:
    """Let a layer add adapters to its output; `table` is None for groups of experts."""
    module.__class__ = _subclass(type(module))  # type: ignore[arg-type]  # mypy does not take a class for hashable
    if table is not None:
        module.adapters = table


def restore(module: Any) -> None:
    """Make a layer what it was before `adapt`."""
    _, module.__class__ = type(module).__bases__
    vars(module).pop("adapters", None)


@cache
def _subclass(base: type[Any]) -> type[Any]:
    kind = next(kind for bases, kind in _KINDS if issubclass(base, bases))
    return type(base.__name__, (kind, base), {"__module__": base.__module__})
