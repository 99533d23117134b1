"""Facts about the weights of a loaded model: their bytes, types and versions, and how they compare with padding."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.utils import get_total_parameters

from worker.models.load import LoadedModel
from worker.runner.memory import Memory
from worker.runner.vision.half import VisionHalf

PADDING_COST_CPU = 4
"""On a CPU, attending to a byte of the cache takes 3 to 5 times as long as multiplying by a byte of the weights."""
PADDING_DIVISOR = 32
"""The padding of a length bucket may take at most 1/32 of the memory for caches, regardless of the model size."""


def padding_worth_a_pass(loaded: LoadedModel) -> int:
    """Return the bytes of padding that take as long to attend to as one pass over all weights."""
    cost = PADDING_COST_CPU if mx.default_device() == mx.cpu else 1
    return weights_bytes(loaded) // cost


def max_padding_bytes(loaded: LoadedModel, memory: Memory) -> int:
    """Return the maximum bytes of padding per length bucket."""
    return min(padding_worth_a_pass(loaded), memory.max_bytes // PADDING_DIVISOR)


def bytes_of(module: Any) -> int:
    """Return the bytes of a module's weights."""
    return sum(array.nbytes for array in _arrays(module))


def weights_bytes(loaded: LoadedModel) -> int:
    """Return the bytes of a model's weights."""
    return bytes_of(loaded.model)


def about(loaded: LoadedModel, vision: VisionHalf | None) -> dict[str, object]:
    """Return the facts for `/health`; see `ModelRunner.about`."""
    types = {str(array.dtype).removeprefix("mlx.core.") for array in _arrays(loaded.model)}
    quantisation = loaded.config.get("quantization") or {}
    facts: dict[str, object] = {
        "device": str(mx.default_device()),
        "dtype": "/".join(sorted(types)),
        "quantisation_bits": quantisation.get("bits"),
        "parameters": get_total_parameters(loaded.model),  # type: ignore[no-untyped-call]
        "mlx": version("mlx"),
        "mlx_lm": version("mlx-lm"),
    }
    if vision is not None:
        parameters = sum(array.size for array in _arrays(vision.encoder.tower))
        facts |= {"mlx_vlm": version("mlx-vlm"), "encoder_parameters": parameters}
    return facts


def _arrays(module: Any) -> list[mx.array]:
    return list(dict(tree_flatten(module.parameters())).values())
