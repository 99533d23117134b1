"""What a model's files tell of it before anybody loads it: its context, and the bytes that its weights will take."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from shared.models.folder import ModelError, safetensors_header, weight_files

MANIFEST: Final = "mlxq.json"
"""Where scripts/fetch_model notes what it fetched; `scripts.model_files.manifest` writes it."""
_CONTEXT_NAMES: Final = ("max_position_embeddings", "max_sequence_length", "max_seq_len", "n_positions", "seq_length")
_MOST_SANE: Final = 100_000_000
"""Tokenizers without a limit say 1e30."""

GROUP: Final = 64
"""Weights that are packed together share a scale and a bias."""
_NEVER_PACKED: Final = ("vision_tower.", "visual.", "model.visual.")
"""What encodes images; the first name is MLX's."""
_FLOATS: Final = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "float32": 4, "float16": 2, "bfloat16": 2}


def context_of(config: Mapping[str, Any], tokenizers: float | None) -> int | None:
    """Most tokens of prompt and answer: what the weights were made for, or less if the tokenizer says so."""
    places = [place for place in (config, config.get("text_config")) if isinstance(place, Mapping)]
    said = [place[name] for place in places for name in _CONTEXT_NAMES if isinstance(place.get(name), int)]
    limits = [*said[:1], *([int(tokenizers)] if tokenizers and tokenizers < _MOST_SANE else [])]
    return min(limits, default=None)


def told_context(folder: Path) -> int | None:
    """The same of a folder; None when it does not say, or is no model."""
    config, tokenizer = (_read(folder / name) for name in ("config.json", "tokenizer_config.json"))
    limit = tokenizer.get("model_max_length")
    return context_of(config, limit if isinstance(limit, int | float) else None)


def weights_bytes(folder: Path, dtype: str | None = None, bits: int | None = None) -> int:
    """About the bytes that a folder's weights take in memory, turned into a type or packed; 0: it is no model."""
    bits = None if _read(folder / "config.json").get("quantization") else bits
    try:
        headers = [safetensors_header(folder / name) for name in weight_files(folder)]
        tensors = [
            (not name.startswith(_NEVER_PACKED), tensor)
            for header in headers
            for name, tensor in header.items()
            if name != "__metadata__"
        ]
        return round(sum(_bytes(tensor, dtype, bits if packs else None) for packs, tensor in tensors))
    except (ModelError, OSError, LookupError, TypeError, ValueError, OverflowError):
        # Whoever loads it will say why not.
        return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def fetched_otherwise(folder: Path, repository: str, revision: str | None) -> str:
    """What a folder holds instead of that revision of a hub's repository; empty when nobody knows of anything else.

    Args:
        revision: branch, tag or commit; None: any.
    """
    told = _read(folder / MANIFEST)
    source, commit, asked = (str(told.get(key) or "") for key in ("source", "revision", "requested"))
    if not source or Path(source).is_absolute():  # a copy of a folder that may be anything's
        return ""
    if source != repository:
        return source
    # Who names no revision gets the hub's main branch.
    fits = (
        revision is None or revision in (commit, asked or "main") or (len(revision) > 6 and commit.startswith(revision))
    )
    return "" if fits else f"revision {asked or 'main'} ({commit})"


def _bytes(tensor: Mapping[str, Any], dtype: str | None, bits: int | None) -> float:
    start, end = map(int, tensor["data_offsets"])
    size = _FLOATS.get(str(tensor.get("dtype")))
    if size is None:
        return float(end - start)  # packed already
    count, each, shape = (end - start) / size, _FLOATS.get(dtype or "", size), tensor.get("shape") or [0]
    if bits is not None and len(shape) > 1 and shape[-1] % GROUP == 0:
        return count * (bits / 8 + 2 * each / GROUP)
    return count * each


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
