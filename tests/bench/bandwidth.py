"""The upper limit for one client: every token reads all weights, and memory bandwidth is limited.

`python -m tests.bench.bandwidth` measures bytes per second in two ways.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shared.blas import prefer_openblas
from shared.settings import ROOT

CACHED_BYTES = 2**27
"""Smaller weights fit largely into the processor's caches, so memory bandwidth is no limit for them."""
_TIMES = 10
_BYTES = {"gpu": 2**30, "cpu": 2**28}
_ROW = 4096
_EMBEDDING = "embed_tokens.weight"
_HEAD = "lm_head.weight"


def bytes_per_token(model: Path) -> int:
    """Bytes of weights that a dense text model reads per step: all, except an untied input embedding."""
    sizes: dict[str, int] = {}
    for shard in sorted(model.glob("model*.safetensors")):
        with shard.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        header.pop("__metadata__", None)
        sizes |= {name: each["data_offsets"][1] - each["data_offsets"][0] for name, each in header.items()}
    tied = not any(name.endswith(_HEAD) for name in sizes)
    return sum(size for name, size in sizes.items() if tied or not name.endswith(_EMBEDDING))


def memory_speed() -> dict[str, float]:
    """Bytes per second of a copy (read and written) and of a matrix-vector product (read), the best of several runs."""
    import mlx.core as mx

    kind = "gpu" if mx.default_device() == mx.gpu else "cpu"
    dtype = mx.bfloat16 if kind == "gpu" else mx.float32
    matrix = mx.zeros((_BYTES[kind] // dtype.size // _ROW, _ROW), dtype)
    vector = mx.ones((_ROW, 1), dtype)
    return {
        "copy": 2 * matrix.nbytes / _best(lambda: mx.eval(matrix + 1)),
        "matrix_vector": matrix.nbytes / _best(lambda: mx.eval(matrix @ vector)),
    }


def _best(action: Callable[[], Any]) -> float:
    """Seconds of the fastest of several runs, after one that does not count."""
    action()
    times = []
    for _ in range(_TIMES):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return min(times)


def measured() -> dict[str, float]:
    """`memory_speed` in another process, so that its memory is freed."""
    command = [sys.executable, "-m", "tests.bench.bandwidth"]
    found: dict[str, float] = json.loads(subprocess.check_output(command, cwd=ROOT, text=True))
    return found


def limit(model: Path, speed: dict[str, float]) -> dict[str, float]:
    """The bytes that a model reads per token, the memory's bytes per second, and the resulting tokens per second."""
    needed, bytes_per_s = bytes_per_token(model), max(speed.values())
    return {"bytes_per_token": needed, "bytes_per_s": bytes_per_s, "tokens_per_s": bytes_per_s / needed}


def lines(found: dict[str, Any]) -> list[str]:
    """The result of `cli.add_bandwidth` for the terminal."""
    speed = found.get("measured", {})
    limits = {name: each for name, each in found.items() if name != "measured"}
    measured_line = (
        [f"memory bandwidth: {', '.join(f'{name} {value / 1e9:.1f} GB/s' for name, value in speed.items())}"]
        if speed
        else []
    )
    return measured_line + [
        f"{name}: {each['bytes_per_token'] / 1e9:.3f} GB of weights per token, at most {each['tokens_per_s']:.1f} "
        f"tokens/s for one client"
        for name, each in limits.items()
    ]


if __name__ == "__main__":
    prefer_openblas()
    print(json.dumps(memory_speed()))
