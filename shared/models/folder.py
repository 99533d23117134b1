"""What makes a folder a model that can be served, and the one line that says what is missing."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
"""Endings of files that can run code when they are loaded."""
CODE = (*PICKLES, ".py")
"""Endings of files that no folder may hold."""

_INDEX = "model.safetensors.index.json"
_TOKENIZERS = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"))
_SHARD = re.compile(r"[\w.-]{1,200}\.safetensors", re.ASCII)
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
    check_complete(folder)
    # None of it would be run: but whoever brings it means it to be, and other tools may do so.
    if code := sorted(path.name for path in folder.iterdir() if path.suffix in CODE):
        what = "Python code" if code[0].endswith(".py") else "a pickle file, which can run code"
        raise ModelError(f"{folder} holds {what} ({code[0]!a}): refused; scripts/fetch_model --copy copies it without")


def check_complete(folder: Path) -> None:
    """Check that a folder holds everything a model needs, whatever else is in it.

    Raises:
        ModelError: naming the first thing that is missing or refused.
    """
    if not folder.is_dir():
        raise ModelError(f"{folder} is not a folder")
    check_config(folder)
    for shard in weight_files(folder):
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
    if not isinstance(config.get("model_type"), str) or not config["model_type"]:
        raise ModelError(f"{folder / 'config.json'} names no model_type")
    if "model_file" in config:
        raise ModelError(f"{folder} brings its own code ({_shown(config['model_file'])}): refused")


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


def weight_files(folder: Path) -> list[str]:
    """Names of the weight files: all that a library reads, whether the index has them or not.

    Raises:
        ModelError: there are none, or the index is refused.
    """
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
    for name in named.values():
        if not _is_plain(name):
            raise ModelError(f"{folder / _INDEX} names a file outside of its folder ({_shown(name)}): refused")
        if not _SHARD.fullmatch(name):
            raise ModelError(f"{folder / _INDEX} names no safetensors file ({_shown(name)}): refused")
    return set(named.values())


def _is_plain(name: Any) -> bool:
    """Whether it is the name of a file, and leads nowhere else."""
    return isinstance(name, str) and bool(name) and Path(name).name == name and "\\" not in name


def _check_whole(path: Path) -> None:
    """Compare a safetensors file's length with the one its header tells: a cut copy is found without loading it."""
    header, actual = safetensors_header(path), path.stat().st_size
    places = sorted(_place(tensor, path) for name, tensor in header.items() if name != "__metadata__")
    if any(end > start for (_, end), (start, _) in pairwise(places)):
        raise ModelError(f"{path} has tensors that overlap: refused")
    expected = _begin(path) + max((end for _, end in places), default=0)
    if actual != expected:
        raise ModelError(f"{path} has {actual:,} of {expected:,} bytes")


def safetensors_header(path: Path) -> dict[str, Any]:
    """What a safetensors file says of its tensors, by their names.

    Raises:
        ModelError: it says nothing that can be read.
    """
    if not path.is_file():
        raise ModelError(f"{path.parent} lacks the weight file {path.name}")
    end = _begin(path)
    if not _LENGTH_BYTES < end <= path.stat().st_size:
        raise ModelError(f"{path} is not a whole safetensors file")
    if end - _LENGTH_BYTES > _MOST_HEADER:
        raise ModelError(f"{path} has a header of {end - _LENGTH_BYTES:,} bytes: refused")
    with path.open("rb") as file:
        file.seek(_LENGTH_BYTES)
        return _parse_object(file.read(end - _LENGTH_BYTES), path)


def _begin(path: Path) -> int:
    """Where the tensors of a safetensors file begin: behind its header."""
    with path.open("rb") as file:
        return _LENGTH_BYTES + int.from_bytes(file.read(_LENGTH_BYTES), "little")


def _place(tensor: Any, path: Path) -> tuple[int, int]:
    """Where a tensor of a safetensors file begins and ends, behind the header."""
    match tensor:
        case {"data_offsets": [int(start), int(end)]} if 0 <= start <= end:
            return start, end
    raise ModelError(f"{path} is not a whole safetensors file: a tensor is nowhere in it")


def _shown(said: object) -> str:
    """What a file says, as a part of one line."""
    return ascii(said).strip("'")[:80]


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
