"""Attention on a CPU: the same as MLX's, up to rounding."""

from __future__ import annotations

import mlx.core as mx
import pytest

from worker.runner import cpu_attention
from worker.runner.cpu_attention import MIN_QUERIES, attention

ROWS, HEADS, QUERIES, KEYS, SIZE, VALUE_SIZE = 2, 4, 20, 33, 8, 12


def _arrays(groups: int, queries: int = QUERIES, dtype: mx.Dtype = mx.float32) -> tuple[mx.array, mx.array, mx.array]:
    """Return queries, keys and values."""
    mx.random.seed(groups)
    shapes = (ROWS, HEADS, queries, SIZE), (ROWS, groups, KEYS, SIZE), (ROWS, groups, KEYS, VALUE_SIZE)
    q, k, v = (2 * mx.random.normal(shape).astype(dtype) for shape in shapes)
    return q, k, v


def _mask(name: str, dtype: mx.Dtype) -> mx.array | str | None:
    if name in ("none", "causal"):
        return None if name == "none" else name
    shapes = {
        "keys": (ROWS, 1, 1, KEYS),
        "queries": (QUERIES, KEYS),
        "heads": (HEADS, QUERIES, KEYS),
        "rows": (ROWS, 1, QUERIES, KEYS),
        "all": (ROWS, HEADS, QUERIES, KEYS),
    }
    allowed = mx.random.uniform(shape=shapes[name]) < 0.5
    allowed[..., 0] = True
    return allowed if dtype == mx.bool_ else mx.where(allowed, 0.0, -7.0)


@pytest.mark.parametrize("score_bytes", [1, cpu_attention.SCORE_BYTES], ids=["blocks", "whole"])
@pytest.mark.parametrize("groups", [1, 2, HEADS])
@pytest.mark.parametrize("dtype", [mx.bool_, mx.float32], ids=["bool", "float"])
@pytest.mark.parametrize("name", ["none", "causal", "keys", "queries", "heads", "rows", "all"])
def test_equal_to_mlx_with_each_mask(
    monkeypatch: pytest.MonkeyPatch, name: str, dtype: mx.Dtype, groups: int, score_bytes: int
) -> None:
    monkeypatch.setattr(cpu_attention, "SCORE_BYTES", score_bytes)
    q, k, v = _arrays(groups)
    mask = _mask(name, dtype)
    expected = cpu_attention._mlx_attention(q, k, v, scale=0.4, mask=mask)
    assert mx.allclose(attention(q, k, v, scale=0.4, mask=mask), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32], ids=["float16", "bfloat16", "float32"])
def test_masks_of_smaller_types_lose_nothing(dtype: mx.Dtype) -> None:
    """Multiplied by log2(e) in the mask's type, the lowest values would become minus infinity."""
    q, k, v = _arrays(2)
    mask = mx.where(mx.random.uniform(shape=(QUERIES, KEYS)) < 0.5, mx.finfo(dtype).min, -0.3).astype(dtype)
    mask[-1] = mx.finfo(dtype).min
    found = attention(q, k, v, scale=0.4, mask=mask)
    expected = cpu_attention._mlx_attention(q, k, v, scale=0.4, mask=mask)
    assert mx.allclose(found[:, :, :-1], expected[:, :, :-1], rtol=1e-5, atol=1e-5)
    assert mx.isfinite(found).all()


def test_an_unknown_name_of_a_mask_is_refused() -> None:
    with pytest.raises(ValueError, match="invalid mask"):
        attention(*_arrays(2), scale=0.4, mask="whole")


@pytest.mark.parametrize("mask", [mx.zeros((QUERIES, KEYS), dtype=mx.bool_), mx.full((QUERIES, KEYS), -mx.inf)])
def test_a_token_that_may_attend_to_nothing_has_finite_values(mask: mx.array) -> None:
    assert mx.isfinite(attention(*_arrays(2), scale=0.4, mask=mask)).all()


@pytest.mark.parametrize(
    ("queries", "dtype", "used"),
    [(MIN_QUERIES, mx.float32, True), (MIN_QUERIES - 1, mx.float32, False), (MIN_QUERIES, mx.float16, False)],
)
def test_short_passes_and_other_types_use_mlx(
    monkeypatch: pytest.MonkeyPatch, queries: int, dtype: mx.Dtype, used: bool
) -> None:
    monkeypatch.setattr(cpu_attention, "_mlx_attention", lambda *_, **__: None)
    assert (attention(*_arrays(2, queries, dtype), scale=1.0) is not None) is used
