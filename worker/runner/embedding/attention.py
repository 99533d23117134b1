"""What the encoders share: modules, attention in both directions, activations, and the masks of padded batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import mlx.core as mx
from mlx import nn as _nn

from shared.models.folder import ModelError

nn: Any = _nn  # MLX has no types for it

SCORE_BYTES: Final = 64 * 2**20
"""Bytes of attention scores to compute at a time, where MLX has no fused kernel. Long inputs take several blocks of
queries, so the memory of a pass grows with the length and not with its square."""
_FLOAT_BYTES: Final = 4
_ACTIVATIONS: Final[Mapping[str, Callable[[mx.array], mx.array]]] = {
    "gelu": nn.gelu,
    "gelu_new": nn.gelu_approx,
    "gelu_pytorch_tanh": nn.gelu_approx,
    "relu": nn.relu,
    "silu": nn.silu,
    "swish": nn.silu,
    "tanh": mx.tanh,
}


def activation(name: str) -> Callable[[mx.array], mx.array]:
    """Return the activation function with transformers' name.

    Raises:
        ModelError: it is not supported.
    """
    if name not in _ACTIVATIONS:
        raise ModelError(f"the activation {name!r} is not supported; supported are {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def group(**parts: Any) -> Any:
    """Return a module that only gives its parts the names of the weights on the hub."""
    module = nn.Module()
    for name, part in parts.items():
        setattr(module, name, part)
    return module


def block_rows(batch: int, heads: int, length: int) -> int:
    """Return how many queries of each input attend at a time."""
    return max(1, min(length, SCORE_BYTES // max(1, batch * heads * length * _FLOAT_BYTES)))


def attend(queries: mx.array, keys: mx.array, values: mx.array, mask: mx.array) -> mx.array:
    """Let each token attend to all tokens that the mask allows.

    Args:
        queries, keys, values: batch × heads × tokens × head size.
        mask: booleans, batch × 1 × (tokens or 1) × tokens.

    Returns:
        Batch × tokens × (heads · head size).
    """
    batch, heads, length, size = queries.shape
    rows = block_rows(batch, heads, length)
    blocks = []
    for start in range(0, length, rows):
        end = min(start + rows, length)
        allowed = mask if mask.shape[2] == 1 else mask[:, :, start:end]
        blocks.append(
            mx.fast.scaled_dot_product_attention(queries[:, :, start:end], keys, values, scale=size**-0.5, mask=allowed)
        )
    attended = blocks[0] if len(blocks) == 1 else mx.concatenate(blocks, axis=2)
    return attended.transpose(0, 2, 1, 3).reshape(batch, length, heads * size)


def split_heads(values: mx.array, heads: int) -> mx.array:
    """Return batch × tokens × hidden as batch × heads × tokens × head size."""
    batch, length, hidden = values.shape
    return values.reshape(batch, length, heads, hidden // heads).transpose(0, 2, 1, 3)


def present(lengths: mx.array, length: int) -> mx.array:
    """Return which of `length` columns of each row are tokens, not padding: booleans, rows × columns."""
    return mx.arange(length)[None] < lengths[:, None]
