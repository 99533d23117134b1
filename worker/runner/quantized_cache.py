"""Quantised keys and values: attention layers that keep every token store them with 8 or 4 bits per number.

Sliding windows and recurrent states keep their type, because they do not grow. Architectures whose attention reads the
cache itself (latent attention) or adds sinks cannot use quantised keys and values; mlx-lm has no code for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import mlx.core as mx
from mlx_lm.models.cache import CacheList, KVCache, QuantizedKVCache, make_prompt_cache

from worker.runner.column_cache import ColumnCache

_GROUP_SIZES: Final = (64, 32)
"""Possible numbers of consecutive values with a common scale, in the order of preference."""


class CannotQuantize(Exception):
    """The architecture does not work with quantised keys and values."""


class QuantizedColumnCache(ColumnCache):
    """See `ColumnCache`. `keys` and `values` are tuples of packed numbers, scales and biases.

    Attributes:
        bits, group_size: mlx-lm's attention recognises a quantised cache by them.
    """

    def __init__(self, left_padding: Sequence[int], bits: int, group_size: int) -> None:
        super().__init__(left_padding)
        self.bits = bits
        self.group_size = group_size

    @property
    def arrays(self) -> list[mx.array]:
        """See `ColumnCache.arrays`."""
        return [] if self.keys is None else [*self.keys, *self.values]

    @arrays.setter
    def arrays(self, arrays: Sequence[mx.array]) -> None:
        half = len(arrays) // 2
        self.keys, self.values = tuple(arrays[:half]), tuple(arrays[half:])

    def _encoded(self, keys: mx.array, values: mx.array) -> list[mx.array]:
        options: Any = {"group_size": self.group_size, "bits": self.bits}
        return [*mx.quantize(keys, **options), *mx.quantize(values, **options)]

    def _visible(self, arrays: Any) -> Any:
        return tuple(array[:, :, : self.end] for array in arrays)


def quantize_cache(model: Any, bits: int) -> None:
    """Let a model use quantised keys and values in all caches that are made for it from now on.

    Raises:
        CannotQuantize: the model does not run with them.
    """
    group_size = _group_size(model)
    original = type(model)

    def make_cache(self: Any) -> list[Any]:
        layers = original.make_cache(self) if hasattr(original, "make_cache") else [KVCache() for _ in self.layers]  # type: ignore[no-untyped-call]
        return [_quantized(layer, bits, group_size) for layer in layers]

    # A subclass rather than an attribute, because the proof of batching copies models to shorten them.
    name = f"{original.__qualname__}KV{bits}"
    model.__class__ = type(name, (original,), {"make_cache": make_cache, "__module__": original.__module__})
    try:
        cache = make_prompt_cache(model)
        for ids in ([[0, 0]], [[0]]):
            mx.eval(model(mx.array(ids), cache=cache))
    except Exception as error:
        model.__class__ = original
        raise CannotQuantize(str(error)) from error


def _group_size(model: Any) -> int:
    cache = make_prompt_cache(model)
    model(mx.array([[0]]), cache=cache)
    sizes = [array.shape[-1] for layer in cache for array in _arrays(layer)]
    for group_size in _GROUP_SIZES:
        if sizes and all(size % group_size == 0 for size in sizes):
            return group_size
    raise CannotQuantize(f"no layer keeps all keys and values, or their sizes are not multiples of {_GROUP_SIZES[-1]}")


def _arrays(layer: Any) -> list[mx.array]:
    if isinstance(layer, CacheList):
        return [array for part in layer.caches for array in _arrays(part)]
    return [array for array in (layer.keys, layer.values) if array is not None] if type(layer) is KVCache else []


def _quantized(layer: Any, bits: int, group_size: int) -> Any:
    if isinstance(layer, CacheList):
        return CacheList(*(_quantized(part, bits, group_size) for part in layer.caches))  # type: ignore[no-untyped-call]
    return QuantizedKVCache(group_size, bits) if type(layer) is KVCache else layer
