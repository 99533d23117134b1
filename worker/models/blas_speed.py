"""How fast this machine multiplies float32 matrices, through whatever BLAS or GPU MLX has."""

from __future__ import annotations

import time

import mlx.core as mx


def measure_gflops(size: int = 1024, budget_s: float = 0.2, most: int = 20) -> float:
    """Billions of float32 operations a second: the best of several products of two `size` × `size` matrices.

    Call it on the thread that owns MLX. It ends after `budget_s`, or after one product where that takes longer.

    Args:
        size: rows and columns; small enough to be quick, large enough to keep every core busy.
        budget_s: no further product is begun after this time.
        most: products at the most.
    """
    left, right = mx.ones((size, size)), mx.full((size, size), 0.5)
    mx.eval(left, right)
    best = float("inf")
    end = time.perf_counter() + budget_s
    for _ in range(most):
        start = time.perf_counter()
        mx.eval(left @ right)
        now = time.perf_counter()
        best = min(best, now - start)
        if now >= end:
            break
    return 2 * size**3 / best / 1e9
