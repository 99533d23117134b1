"""Makes a small model of a model's first layers: cheap to run, and enough to see how its layers treat a batch."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from operator import is_
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.utils import tree_flatten, tree_map

from worker.runner import kv_cache

LEAST = 4
"""Minimum number of layers of a sample."""

Path = list[tuple[Any, str]]
"""Modules from a model down to the one with the layers, each with the name of the attribute that holds the next."""


def sample_of(model: Any) -> Any:
    """Return a copy of a model with only its first layers, at least one of each kind, which shares their weights.

    Returns the model itself if it has few layers or if they cannot be found. A sample may also fail to run because it
    lacks later layers, so the caller must try it.
    """
    layers = getattr(model, "layers", None)
    path = _path_to(model, layers) if isinstance(layers, list) else None
    if not isinstance(layers, list) or path is None:
        return model
    kinds = _kinds(model, layers)
    count = max(LEAST, 1 + max(map(kinds.index, kinds)))
    return model if count >= len(layers) else _copied(path, count)


@contextmanager
def in_float32(model: Any, most_bytes: int) -> Iterator[bool]:
    """Let the model compute in float32 inside the block, if that takes at most `most_bytes`; yield whether it does."""
    before = model.parameters()
    arrays: list[mx.array] = list(dict(tree_flatten(before)).values())
    needed = sum(array.size * mx.float32.size for array in arrays if _short(array))
    if needed > most_bytes:
        yield False
        return
    try:
        model.update(tree_map(lambda array: array.astype(mx.float32) if _short(array) else array, before))
        yield True
    finally:
        model.update(before)


def _short(array: mx.array) -> bool:
    return array.dtype in (mx.bfloat16, mx.float16)


def _kinds(model: Any, layers: list[Any]) -> list[Any]:
    row = kv_cache.empty_row(model)
    caches = [kv_cache.kind_of(each) for each in row] if len(row) == len(layers) else [None] * len(layers)
    return [(_kind(layer), cache) for layer, cache in zip(layers, caches, strict=True)]


def _kind(layer: Any) -> Any:
    """Return what distinguishes kinds of layers: classes, options, and the names of the weights."""
    parts = [(type(module), _options(module)) for _, module in layer.named_modules()]
    return parts, list(dict(tree_flatten(layer.parameters())))


def _options(module: Any) -> list[tuple[str, Any]]:
    return [(name, value) for name, value in vars(module).items() if isinstance(value, bool | str)]


def _path_to(module: Any, layers: list[Any]) -> Path | None:
    for name, value in module.items():
        if isinstance(value, list) and len(value) == len(layers) and all(map(is_, value, layers)):
            return [(module, name)]
        if isinstance(value, Module) and (rest := _path_to(value, layers)) is not None:
            return [(module, name), *rest]
    return None


def _copied(path: Path, count: int) -> Any:
    """Copy the modules of a path, for a model of `count` layers."""
    modules = [copy.copy(module) for module, _ in path]
    names = [name for _, name in path]
    all_layers = modules[-1][names[-1]]
    for module in modules:
        _shorten(module, len(all_layers), count)
    for module, name, below in zip(modules, names, modules[1:], strict=False):
        module[name] = below
    modules[-1][names[-1]] = all_layers[:count]
    return modules[0]


def _shorten(module: Module, layers: int, count: int) -> None:
    """Shorten lists with one entry per layer, and set layer counts, in the module and in its configuration."""
    for name, value in [*vars(module).items(), *module.items()]:
        if name in _COUNTS:
            setattr(module, name, count)
        elif isinstance(value, list | tuple) and len(value) == layers:
            setattr(module, name, value[:count])
        elif is_dataclass(value) and not isinstance(value, type):
            fewer = copy.copy(value)
            for option, setting in vars(value).items():
                if option in _COUNTS:
                    setattr(fewer, option, count)
                elif isinstance(setting, list | tuple) and len(setting) == layers:
                    setattr(fewer, option, setting[:count])
            setattr(module, name, fewer)


_COUNTS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")
