"""Replaces the reference BLAS in MLX's Linux wheel by OpenBLAS.

OpenBLAS is loaded with global symbols before MLX is imported, so the dynamic linker resolves MLX's BLAS calls to it.
Only float32 becomes faster: MLX does not use BLAS for other types.

Measured with SmolLM2-135M in float32 on two shared cores of an AMD EPYC, by `worker.models.load.measure_gflops` and
mlx-lm's BatchGenerator (best of two to four runs with OpenBLAS, one run without):

    ======================  =========  ========
    .                       reference  OpenBLAS
    ======================  =========  ========
    GFLOP/s                         6       195
    prefill, 36 tokens, s         3.8       0.3
    decode, 1 row, tok/s          6.5        17
    decode, 32 rows, tok/s         -        200
    ======================  =========  ========

OpenBLAS starts one thread per core, and this default is kept. Its threads spin between products, so
`OPENBLAS_NUM_THREADS=1` saves a fifth of the CPU time per token at 32 rows and a third at one row, but two threads
decode 32 rows a fifth to a third faster. Several workers on one machine should divide the cores with that variable.
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
    """`openblas`, `accelerate` (macOS) or `reference` (part of MLX's wheel)."""
    path: str = ""
    """Path or name of the loaded library."""
    version: str = ""
    """The library's own description, such as `OpenBLAS 0.3.21 … SkylakeX MAX_THREADS=64`."""
    reason: str = ""
    """Why OpenBLAS is not in use."""


def prefer_openblas() -> Blas:
    """Load OpenBLAS on Linux; must be called before the first `import mlx.core`.

    The environment variable `OPENBLAS_LIB`, a path, takes precedence over the names that distributions use. Never
    raises: without OpenBLAS everything works, but slowly.
    """
    if (system := platform.system()) == "Darwin":
        return Blas("accelerate", reason="macOS includes a fast BLAS")
    if system != "Linux":
        return Blas("reference", reason=f"not supported on {system}")
    if _MLX in sys.modules:
        return Blas("reference", reason="MLX was imported before OpenBLAS could be loaded")
    for candidate in _candidates(os.environ):
        try:
            library = ctypes.CDLL(candidate, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        return Blas("openblas", candidate, _version(library))
    return Blas("reference", reason="libopenblas is missing; on Debian or Ubuntu: apt-get install libopenblas0-pthread")


def _candidates(environment: Mapping[str, str]) -> Iterator[str]:
    if chosen := environment.get("OPENBLAS_LIB"):
        yield chosen
    yield from _NAMES
    # The dynamic linker does not always search the libraries of a conda environment.
    for prefix in (environment.get("CONDA_PREFIX"), sys.prefix):
        if prefix:
            yield str(Path(prefix) / "lib" / _NAMES[0])


def _version(library: ctypes.CDLL) -> str:
    try:
        describe = library.openblas_get_config
    except AttributeError:
        return ""
    describe.restype = ctypes.c_char_p
    description: bytes | None = describe()
    return (description or b"").decode("ascii", "replace").strip()
