"""Stores on disk which rows of a model may share passes, as measured when the model was first loaded."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Generator
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import mlx.core as mx
from mlx.utils import tree_flatten

from shared.tokenizing.files import write_private
from worker.models.load import LoadedModel
from worker.runner.batching.proof import proving
from worker.runner.batching.support import BatchingSupport

logger = logging.getLogger(__name__)

_VERSION: Final = 2
"""Version of the proof. Verdicts of other versions are ignored."""
_LIBRARIES: Final = ("mlx", "mlx-lm", "mlx-vlm")


def find(
    loaded: LoadedModel, vocabulary: int, spare_bytes: int, folder: Path
) -> Generator[None, None, BatchingSupport]:
    """Return the verdict for a model as it is configured, on this device; measure it if there is none.

    Args:
        vocabulary, spare_bytes: see `proving`.
        folder: where all verdicts are stored.

    Yields:
        After each pass of the measurement.

    Raises:
        CannotRun: the model cannot be served.
    """
    file = folder / f"{_name(loaded)}.json"
    found = _read(file)
    if found is None:
        found = yield from proving(loaded.model, vocabulary, spare_bytes)
        mx.clear_cache()
        _write(file, found)
    log = logger.warning if found.restricted else logger.info
    log("model_batching", extra={"model": loaded.card.id, **found.to_dict()})
    return found


def _name(loaded: LoadedModel) -> str:
    """Name everything that the verdict depends on. The weights themselves do not matter, only their types."""
    arrays: list[mx.array] = list(dict(tree_flatten(loaded.model.parameters())).values())
    types = sorted({str(array.dtype) for array in arrays})
    code = f"{type(loaded.model).__module__}.{type(loaded.model).__qualname__}"
    device = [str(mx.default_device()), mx.device_info().get("device_name")]
    parts = [_VERSION, code, loaded.config, types, device, *map(version, _LIBRARIES)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _read(file: Path) -> BatchingSupport | None:
    try:
        found: Any = json.loads(file.read_bytes())
        return BatchingSupport.from_dict(found)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def _write(file: Path, found: BatchingSupport) -> None:
    try:
        write_private(file, json.dumps(found.to_dict()).encode())
    except OSError as error:
        logger.warning("batching_verdict_not_kept", extra={"reason": str(error)})
