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
_FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Bytes of a number, by the names of types in safetensors files."""
_SHORT = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
PACKED_TOGETHER = 64
"""Weights that are packed share a scale and an offset, so many of them."""
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


def weights_size(folder: Path, dtype: str | None = None, bits: int | None = None) -> int:
    """About the bytes that a model's weights take in memory, by the headers of their files; 0 where there are none.

    Args:
        dtype, bits: what they become when they are loaded; None: as they are.
    """
    return sum(_file_size(path, dtype, bits) for path in folder.glob("*.safetensors"))


def _file_size(path: Path, dtype: str | None, bits: int | None) -> int:
    try:
        return sum(_tensor_size(tensor, path, dtype, bits) for tensor in _read_header(path)[1])
    except (ModelError, OSError):  # whoever loads it will say so
        return path.stat().st_size


def _tensor_size(tensor: Any, path: Path, dtype: str | None, bits: int | None) -> int:
    start, end = _place(tensor, path)
    each = _FLOATS.get(tensor.get("dtype"))
    if each is None:
        return end - start
    count = (end - start) // each
    wide = _FLOATS[_SHORT[dtype]] if dtype else each
    shape = tensor.get("shape") or [0]
    if bits and len(shape) == 2 and shape[-1] % PACKED_TOGETHER == 0:
        return count * bits // 8 + 2 * wide * count // PACKED_TOGETHER
    return count * wide


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
    actual = path.stat().st_size
    header_bytes, tensors = _read_header(path)
    expected = _LENGTH_BYTES + header_bytes + max((_place(tensor, path)[1] for tensor in tensors), default=0)
    if actual != expected:
        raise ModelError(f"{path} has {actual:,} of {expected:,} bytes")


def _read_header(path: Path) -> tuple[int, list[Any]]:
    """The length of a safetensors file's header, and what it tells of each tensor."""
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if not 0 < header_bytes <= path.stat().st_size - _LENGTH_BYTES:
            raise ModelError(f"{path} is not a whole safetensors file")
        if header_bytes > _MOST_HEADER:
            raise ModelError(f"{path} has a header of {header_bytes:,} bytes: refused")
        header = _parse_object(file.read(header_bytes), path)
    return header_bytes, [tensor for name, tensor in header.items() if name != "__metadata__"]


def _place(tensor: Any, path: Path) -> tuple[int, int]:
    """Where a tensor of a safetensors file begins and ends, behind the header."""
    match tensor:
        case {"data_offsets": [int(start), int(end)]} if 0 <= start <= end:
            return start, end
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
