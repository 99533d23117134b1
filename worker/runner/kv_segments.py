"""What is kept of a row's cache after it has left the batch, in the two kinds that models allow.

Plain attention has a key and a value for each token: any run of tokens can be kept, cut and put together again. What
sliding windows and state-space layers remember of a row cannot be cut: it is kept whole, and is of use at the very
token where it was taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, Self, cast

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map
from mlx_lm.models.cache import KVCache

from worker.runner import kv_cache as kv
from worker.runner.prefix_blocks import Block, Tensor

_TYPES = {mx.float32: ("F32", np.float32), mx.float16: ("F16", np.float16), mx.bfloat16: ("BF16", np.uint16)}
"""Safetensors' names of the types that a cache may have, and those that carry the same bits in numpy."""


class Piece(Protocol):
    """What is kept of a run of tokens of a row. Never changed.

    Attributes:
        cuttable: whether a row that shares only its first tokens can use those.
    """

    cuttable: bool
    nbytes: int

    @classmethod
    def of(cls, layers: kv.Layers, row: int, start: int, stop: int) -> Self:
        """Take it out of a batch's cache, in which this row has `stop` tokens. Queues a copy on the device."""
        ...

    def cut(self, at: int) -> tuple[Self | None, Self]:
        """What is kept of the first `at` tokens alone, and of the rest behind them."""
        ...

    @classmethod
    def join(cls, pieces: Sequence[Any], length: int) -> kv.Layers:
        """A cache for one row that has so many tokens, out of the pieces along its way."""
        ...


class Columns:
    """Keys and values of a run of tokens: plain attention."""

    cuttable = True

    def __init__(self, arrays: list[tuple[mx.array, mx.array]]) -> None:
        self.arrays = arrays
        self.nbytes = sum(keys.nbytes + values.nbytes for keys, values in arrays)

    @classmethod
    def of(cls, layers: kv.Layers, row: int, start: int, stop: int) -> Self:
        """See `Piece.of`."""
        arrays = []
        for layer in layers:
            end = layer._idx  # noqa: SLF001 - there is no public name for where the rows end
            arrays.append(_copied(layer.keys, layer.values, row, end - stop + start, end))
        return cls._queued(arrays)

    def cut(self, at: int) -> tuple[Self, Self]:
        """See `Piece.cut`."""
        return self._part(0, at), self._part(at, self.length)

    @classmethod
    def join(cls, pieces: Sequence[Columns], length: int) -> kv.Layers:
        """See `Piece.join`."""
        layers = []
        for parts in zip(*(piece.arrays for piece in pieces), strict=True):
            layer = KVCache()  # type: ignore[no-untyped-call]
            layer.keys, layer.values = (_joined(arrays, length) for arrays in zip(*parts, strict=True))
            layer.offset = length
            layers.append(layer)
        return layers

    @property
    def length(self) -> int:
        """How many tokens it has."""
        return int(self.arrays[0][0].shape[2])

    def behind(self, at: int) -> Self:
        """What is kept behind the first `at` tokens."""
        return self._part(at, self.length) if at else self

    def tensors(self) -> Block:
        """What it holds, as bytes of the host that are not copied; it must be held as long as they are used."""
        return [_tensor(array) for pair in self.arrays for array in pair]

    @classmethod
    def from_tensors(cls, block: Block) -> Self:
        """The opposite of `tensors`. Copies them, so nothing of theirs is held."""
        arrays = [_array(tensor) for tensor in block]
        return cls._queued(list(zip(arrays[::2], arrays[1::2], strict=True)))

    def _part(self, start: int, stop: int) -> Self:
        return self._queued([_copied(keys, values, 0, start, stop) for keys, values in self.arrays])

    @classmethod
    def _queued(cls, arrays: list[tuple[mx.array, mx.array]]) -> Self:
        # At once: a slice that waits would keep the whole batch's cache, and make the next step copy it.
        mx.async_eval(arrays)  # type: ignore[no-untyped-call]
        return cls(arrays)


class State:
    """All that a model remembers of a row at one token: for sliding windows, state-space layers and mixtures."""

    cuttable = False

    def __init__(self, layers: kv.Layers) -> None:
        self.layers = layers
        self.nbytes = kv.nbytes(layers)

    @classmethod
    def of(cls, layers: kv.Layers, row: int, start: int, stop: int) -> Self:  # noqa: ARG003 - it is whole or nothing
        """See `Piece.of`."""
        taken = [layer.extract(row) for layer in layers]
        for layer in taken:
            layer.state = tree_map(_owned, layer.state)
        mx.async_eval(kv.states(taken))  # type: ignore[no-untyped-call]
        return cls(taken)

    def cut(self, at: int) -> tuple[None, Self]:  # noqa: ARG002
        """See `Piece.cut`."""
        return None, self

    @classmethod
    def join(cls, pieces: Sequence[State], length: int) -> kv.Layers:  # noqa: ARG003
        """See `Piece.join`."""
        return pieces[-1].layers


def kind_for(model: Any) -> type[Piece] | None:
    """The kind of piece that this model's cache can be kept in; None when it cannot."""
    layers = kv.single(model)
    if all(type(layer) is KVCache for layer in layers):
        return Columns
    return State if all(hasattr(layer, "extract") for layer in kv.flat(kv.merge([layers]))) else None


def storable(model: Any) -> bool:
    """Whether pieces of this model's cache can be written to files: plain attention only."""
    return kind_for(model) is Columns


def _tensor(array: mx.array) -> Tensor:
    return Tensor(_TYPES[array.dtype][0], array.shape, np.frombuffer(memoryview(cast("Any", array)), np.uint8))


def _array(tensor: Tensor) -> mx.array:
    dtype, bits = next((dtype, bits) for dtype, (name, bits) in _TYPES.items() if name == tensor.dtype)
    return mx.array(tensor.data.view(bits).reshape(tensor.shape)).view(dtype)


def _copied(keys: mx.array, values: mx.array, row: int, start: int, stop: int) -> tuple[mx.array, mx.array]:
    return _owned(keys[row : row + 1, :, start:stop]), _owned(values[row : row + 1, :, start:stop])


def _owned(part: Any) -> Any:
    """A copy with a buffer of its own: a mere slice would keep all of what it was cut from."""
    return mx.contiguous(part) if isinstance(part, mx.array) else part


def _joined(arrays: Sequence[mx.array], length: int) -> mx.array:
    *whole, last = arrays
    part = last[:, :, : length - sum(array.shape[2] for array in whole)]
    return mx.concatenate([*whole, part], axis=2) if whole else part
