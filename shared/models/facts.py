"""What a model's files declare: its context, the memory of its weights, and the repository it was fetched from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from shared.models.folder import ModelError, safetensors_header, weight_files
from shared.models.image_geometry import Coordinates

MANIFEST: Final = "mlxq.json"
"""File that records what scripts/fetch_model fetched; `scripts.model_files.manifest` writes it."""
_CONTEXT_NAMES: Final = (
    *("max_position_embeddings", "max_sequence_length", "max_seq_length", "max_seq_len", "n_positions", "n_ctx"),
    *("seq_length", "model_max_length"),
)
_SCALED_ALREADY: Final = ("default", "llama3", "longrope", "mrope", "su")
"""Types of RoPE scaling with which `max_position_embeddings` is the length after scaling."""
_SAMPLING: Final = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_MAX_FACTOR: Final = 10_000
_MAX_CONTEXT: Final = 100_000_000
"""Tokenizers without a limit declare 1e30."""

GROUP: Final = 64
"""Number of quantized weights that share a scale and a bias."""
_NEVER_QUANTIZED: Final = ("vision_tower.", "visual.", "model.visual.")
"""Prefixes of an image encoder's tensors; the first one is MLX's."""
_FLOAT_BYTES: Final = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "float32": 4, "float16": 2, "bfloat16": 2}


def context_of(config: Mapping[str, Any], tokenizer_limit: float | None) -> int | None:
    """Return the maximum tokens of prompt and answer; None if nothing declares them.

    config.json decides, with its RoPE scaling. The tokenizer's limit counts only where config.json has none: it often
    is that of an earlier model (16,384 for DeepSeek-R1's distillations, whose context is 131,072).
    """
    for section in (config, config.get("text_config")):
        if isinstance(section, Mapping) and (declared := _declared_context(section)):
            return declared
    known = tokenizer_limit is not None and 0 < tokenizer_limit < _MAX_CONTEXT
    return int(tokenizer_limit or 0) if known else None


def _declared_context(section: Mapping[str, Any]) -> int | None:
    for value in (section.get(name) for name in _CONTEXT_NAMES):
        if type(value) is int and value > 0:
            return max(value, _scaled_context(section, value))
    return None


def _scaled_context(section: Mapping[str, Any], declared: int) -> int:
    """The context after RoPE scaling, which multiplies the length that the model was trained with."""
    scaling = section.get("rope_scaling") or section.get("rope_parameters")
    if not isinstance(scaling, Mapping):
        return declared
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    factor = scaling.get("factor")
    if kind in _SCALED_ALREADY or not isinstance(factor, int | float) or not 1 <= factor <= _MAX_FACTOR:
        return declared
    original = scaling.get("original_max_position_embeddings") if kind == "yarn" else None
    return int((original if type(original) is int else declared) * factor)


def declared_context(folder: Path) -> int | None:
    """Return the context that a folder's files declare; None if they declare none."""
    config, tokenizer = (_read(folder / name) for name in ("config.json", "tokenizer_config.json"))
    limit = tokenizer.get("model_max_length")
    return context_of(config, limit if isinstance(limit, int | float) else None)


def modified_at(folder: Path) -> float | None:
    """Return when a folder's config.json was written, in seconds since the epoch; None if there is none."""
    try:
        return (folder / "config.json").stat().st_mtime
    except OSError:
        return None


def declared_coordinates(folder: Path) -> Coordinates:
    """Return what the coordinates in a model's answers refer to, by the type in its config.json."""
    return Coordinates.of(_read(folder / "config.json").get("model_type"))


def declared_sampling(folder: Path) -> dict[str, float]:
    """Return the sampling parameters that a folder's `generation_config.json` declares, unchecked."""
    declared = _read(folder / "generation_config.json")
    values = {name: declared[name] for name in _SAMPLING if type(declared.get(name)) in (int, float)}
    if declared.get("do_sample") is False:
        values["temperature"] = 0.0
    return values


def separate_template(folder: Path) -> str | None:
    """Return the chat template of `chat_template.json`, which the tokenizer library ignores, if it is the only one."""
    if (folder / "chat_template.jinja").exists() or _read(folder / "tokenizer_config.json").get("chat_template"):
        return None
    template = _read(folder / "chat_template.json").get("chat_template")
    return template if isinstance(template, str) else None


def weights_bytes(folder: Path, dtype: str | None = None, bits: int | None = None) -> int:
    """Estimate the bytes of a folder's weights in memory; 0 if it holds no model.

    Args:
        dtype: type to which the weights are converted; None to keep it.
        bits: bits to which the weights are quantized; None to keep them.
    """
    bits = None if _read(folder / "config.json").get("quantization") else bits
    try:
        headers = [safetensors_header(folder / name) for name in weight_files(folder)]
        tensors = [
            (not name.startswith(_NEVER_QUANTIZED), tensor)
            for header in headers
            for name, tensor in header.items()
            if name != "__metadata__"
        ]
        return round(sum(_bytes(tensor, dtype, bits if can_quantize else None) for can_quantize, tensor in tensors))
    except (ModelError, OSError, LookupError, TypeError, ValueError, OverflowError):
        # The files are invalid; loading them reports the reason.
        return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def other_source(folder: Path, repository: str, revision: str | None) -> str:
    """Return which other repository or revision a folder was fetched from; empty if it matches or is unknown.

    Args:
        revision: branch, tag or commit; None matches any.
    """
    manifest = _read(folder / MANIFEST)
    source, commit, requested = (str(manifest.get(key) or "") for key in ("source", "revision", "requested"))
    if not source or Path(source).is_absolute():  # copied from a local folder: its repository is unknown
        return ""
    if source != repository:
        return source
    requested = requested or "main"  # the hub's default
    is_prefix = revision is not None and len(revision) > 6 and commit.startswith(revision)
    matches = revision in (None, commit, requested) or is_prefix
    return "" if matches else f"revision {requested} ({commit})"


def _bytes(tensor: Mapping[str, Any], dtype: str | None, bits: int | None) -> float:
    start, end = map(int, tensor["data_offsets"])
    stored_bytes = _FLOAT_BYTES.get(str(tensor.get("dtype")))
    if stored_bytes is None:
        return float(end - start)  # quantized already
    count, shape = (end - start) / stored_bytes, tensor.get("shape") or [0]
    loaded_bytes = _FLOAT_BYTES.get(dtype or "", stored_bytes)
    if bits is not None and len(shape) > 1 and shape[-1] % GROUP == 0:
        return count * (bits / 8 + 2 * loaded_bytes / GROUP)
    return count * loaded_bytes


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
