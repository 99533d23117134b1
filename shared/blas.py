"""Puts OpenBLAS in front of the reference BLAS that MLX's Linux wheel brings for the CPU.

In front means: loaded into the process, symbols global, before MLX is. The loader then resolves MLX's BLAS calls
to it, and nothing of MLX changes. float32 alone gains: the other types do not go through BLAS.

What it gains (SmolLM2-135M in float32, two cores of an AMD EPYC that others used too, best of two to four runs with
OpenBLAS and of one without; `worker.models.blas_speed` and mlx-lm's BatchGenerator):

    ======================  =========  ========
    .                       reference  OpenBLAS
    ======================  =========  ========
    GFLOP/s                         6       195
    prefill, 36 tokens, s         3.8       0.3
    decode, 1 row, tok/s          6.5        17
    decode, 32 rows, tok/s         -        200
    ======================  =========  ========

Its threads spin between two products: `OPENBLAS_NUM_THREADS=1` takes a fifth less CPU time per token at 32 rows, a
third less at one. But two of them decode 32 rows a fifth to a third faster than one, so the number stays OpenBLAS's
own choice, one a core. Several workers on one machine should share the cores by that variable.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

_NAMES = (
    "libopenblas.so.0",  # Debian, Ubuntu, Arch, conda
    "libopenblasp.so.0",  # Fedora: with threads
    "libopenblaso.so.0",  # Fedora: OpenMP
    "libopenblas.so",
)
_MLX = "mlx.core"


@dataclass(frozen=True)
class Blas:
    """The BLAS that MLX computes with on the CPU."""

    name: str
    """`openblas`, `accelerate` (macOS) or `reference` (what MLX's wheel brings)."""
    path: str = ""
    """The library that was loaded, as the loader found it."""
    version: str = ""
    """What the library says of itself, such as `OpenBLAS 0.3.21 … SkylakeX MAX_THREADS=64`."""
    reason: str = ""
    """Why OpenBLAS is not in use."""


def prefer_openblas() -> Blas:
    """Load OpenBLAS ahead of MLX where that gains something; call it before the first `import mlx.core`.

    `OPENBLAS_LIB`, the path of a library, goes before the names that distributions use. Never raises: without
    OpenBLAS everything works, slowly.
    """
    if (system := platform.system()) == "Darwin":
        return Blas("accelerate", reason="macOS has a fast BLAS of its own")
    if system != "Linux":
        return Blas("reference", reason=f"not looked for on {system}")
    if _MLX in sys.modules:
        return Blas("reference", reason="too late: MLX is loaded already")
    for candidate in _candidates(os.environ):
        try:
            library = ctypes.CDLL(candidate, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        return Blas("openblas", candidate, _version(library))
    return Blas("reference", reason="no libopenblas found; on Debian and Ubuntu: apt-get install libopenblas0-pthread")


def _candidates(environment: Mapping[str, str]) -> Iterator[str]:
    if chosen := environment.get("OPENBLAS_LIB"):
        yield chosen
    yield from _NAMES
    # A conda environment's libraries are not on the loader's path for every python that runs in it.
    for prefix in (environment.get("CONDA_PREFIX"), sys.prefix):
        if prefix:
            yield str(Path(prefix) / "lib" / _NAMES[0])


def _version(library: ctypes.CDLL) -> str:
    try:
        describe = library.openblas_get_config
    except AttributeError:
        return ""
    describe.restype = ctypes.c_char_p
    described: bytes | None = describe()
    return (described or b"").decode("ascii", "replace").strip()
