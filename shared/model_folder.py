"""What makes a folder a model that can be served, and the one line that says what is missing."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
"""Endings of files that can run code when they are loaded."""

_INDEX = "model.safetensors.index.json"
_TOKENIZERS = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"))
_NUMBERED = re.compile(r"model-\d+-of-(\d+)\.safetensors")
_LENGTH_BYTES = 8
MOST_JSON = 200 * 2**20
"""Bytes of a file of JSON that is read: the index of a model of a million tensors has half of it."""
MOST_SHARDS = 10_000
_MOST_HEADER = 100 * 10**6
"""As the safetensors library has it."""
_PROCESSORS = ("preprocessor_config.json", "processor_config.json")


class ModelError(Exception):
    """A model cannot be fetched or used; the text is one line for the user."""


def check_folder(folder: Path) -> None:
    """Check that a folder holds everything a model needs, and no code.

    Reads headers only, never the weights.

    Raises:
        ModelError: naming the first thing that is missing or refused.
    """
    if not folder.is_dir():
        raise ModelError(f"{folder} is not a folder")
    check_config(folder)
    for shard in _shards(folder):
        _check_whole(folder / shard)
    if not any(all((folder / name).is_file() for name in names) for names in _TOKENIZERS):
        raise ModelError(f"{folder} has no tokenizer (tokenizer.json, tokenizer.model, or vocab.json and merges.txt)")
    if model_kind(folder) == "vision" and not any((folder / name).is_file() for name in _PROCESSORS):
        raise ModelError(f"{folder} is a vision model without {_PROCESSORS[0]}")


def check_config(folder: Path) -> None:
    """Check what a model says of itself: it can be known before the weights are there.

    Raises:
        ModelError: naming what is missing or refused.
    """
    config = _read_object(folder / "config.json")
    if not config.get("model_type"):
        raise ModelError(f"{folder / 'config.json'} names no model_type")
    if "model_file" in config:
        raise ModelError(f"{folder} brings its own code ({config['model_file']}): refused")


def check_adapter(folder: Path) -> None:
    """Check that a folder holds LoRA weights.

    Raises:
        ModelError: naming what is missing or refused.
    """
    _read_object(folder / "adapter_config.json")
    _check_whole(folder / "adapters.safetensors")


def model_kind(folder: Path) -> str:
    """`vision` where the model has an encoder for images by its config.json, else `text`; also of no model."""
    try:
        return "vision" if _read_object(folder / "config.json").get("vision_config") else "text"
    except (OSError, ModelError):
        return "text"


def _shards(folder: Path) -> Iterable[str]:
    """Names of the weight files: all that a library reads, whether the index has them or not."""
    indexed = _indexed(folder)
    # mlx-vlm without an index takes any.
    pattern = "*.safetensors" if model_kind(folder) == "vision" and not indexed else "model*.safetensors"
    found = {path.name for path in folder.glob(pattern)} - {"consolidated.safetensors"}
    counts = {match[1] for name in found if (match := _NUMBERED.fullmatch(name))}
    told = {
        f"model-{n:0{len(count)}}-of-{count}.safetensors"
        for count in counts
        for n in range(1, min(int(count), MOST_SHARDS) + 1)
    }
    if shards := indexed | found | told:
        return sorted(shards)
    if pickles := sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES):
        raise ModelError(f"{folder} has its weights only as pickle files ({pickles[0]}), which can run code: refused")
    raise ModelError(f"{folder} has no weights (model*.safetensors)")


def _indexed(folder: Path) -> set[str]:
    """The weight files that the index names, if there is one."""
    if not (folder / _INDEX).is_file():
        return set()
    named = _read_object(folder / _INDEX).get("weight_map")
    if not isinstance(named, dict):
        raise ModelError(f"{folder / _INDEX} has no weight_map")
    if strange := next((name for name in named.values() if not _is_plain(name)), None):
        raise ModelError(f"{folder / _INDEX} names a file outside of its folder ({strange!r}): refused")
    return set(named.values())


def _is_plain(name: object) -> bool:
    """Whether it is the name of a file, and leads nowhere else."""
    return isinstance(name, str) and bool(name) and Path(name).name == name and "\\" not in name


def _check_whole(path: Path) -> None:
    """Compare a safetensors file's length with the one its header tells: a cut copy is found without loading it."""
    if not path.is_file():
        raise ModelError(f"{path.parent} lacks the weight file {path.name}")
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        actual = path.stat().st_size
        if not 0 < header_bytes <= actual - _LENGTH_BYTES:
            raise ModelError(f"{path} is not a whole safetensors file")
        if header_bytes > _MOST_HEADER:
            raise ModelError(f"{path} has a header of {header_bytes:,} bytes: refused")
        header = _parse_object(file.read(header_bytes), path)
    ends = [_end(tensor, path) for name, tensor in header.items() if name != "__metadata__"]
    expected = _LENGTH_BYTES + header_bytes + max(ends, default=0)
    if actual != expected:
        raise ModelError(f"{path} has {actual:,} of {expected:,} bytes")


def _end(tensor: Any, path: Path) -> int:
    """Where a tensor of a safetensors file ends, behind the header."""
    match tensor:
        case {"data_offsets": [int(start), int(end)]} if 0 <= start <= end:
            return end
    raise ModelError(f"{path} is not a whole safetensors file: a tensor is nowhere in it")


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ModelError(f"{path.parent} has no {path.name}")
    if path.stat().st_size > MOST_JSON:
        raise ModelError(f"{path} is larger than a file of its kind is: refused")
    return _parse_object(path.read_bytes(), path)


def _parse_object(text: bytes, path: Path) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not valid JSON") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} is not a JSON object")
    return content
