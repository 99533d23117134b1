"""Checks that a folder holds a complete model and no code. Only headers are read, never the weights."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
"""Suffixes of pickle files, which can run code when they are loaded."""
CODE = (*PICKLES, ".py")
"""Suffixes of files that a model folder must not contain."""

VISION_FAMILIES = (
    *("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"),
    *("pixtral", "mistral3", "lfm2_vl", "internvl", "internvl_chat", "idefics3", "smolvlm", "kimi_vl"),
    *("llava", "llava_next", "deepseekocr", "deepseekocr_2"),
    *("gemma3", "gemma4", "granite4_vision"),
    *("nemotron_h_nano_omni", "NemotronH_Nano_Omni_Reasoning_V3", "nemotron_h_omni"),
    *("glm4v", "glm4v_moe", "glm_ocr", "paddleocr_vl"),
)
"""Values of `model_type` in config.json whose images are supported. Other multimodal folders serve only text."""
_SECTION_TYPES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "internvl": ("text_config", ("qwen3",)),
    "internvl_chat": ("llm_config", ("qwen2",)),
    "llava": ("vision_config", ("clip_vision_model", "siglip_vision_model")),
    "llava_next": ("vision_config", ("clip_vision_model",)),
    "mistral3": ("text_config", ("mistral", "ministral3")),
}
"""Families of which mlx-vlm supports some models: a section of config.json, and the supported types of it."""

ENCODERS = ("bert", "roberta", "xlm-roberta", "modernbert")
"""Values of `model_type` of encoders, which compute vectors or scores instead of text."""
INPUT_KINDS = ("embedding", "rerank")
"""Kinds of models whose jobs have inputs instead of a prompt."""
_NAMED_KIND = re.compile(r"(?:^|[-_.])(?:(embedding|embed)|(reranker))(?:[-_.]|$)", re.IGNORECASE)

_INDEX = "model.safetensors.index.json"
_WHOLE = "model.safetensors"
_VISION_KEYS = ("vision_config", "thinker_config", "img_processor", "mm_vision_tower", "vit_config")
_VISION_TENSOR = re.compile(r"vision|visual|image|(?:^|\.)(?:vit|vpm|sam_model|mm_projector)\.")
_TOKENIZERS = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"))
_SHARD = re.compile(r"[\w.-]{1,200}\.safetensors", re.ASCII)
_NUMBERED = re.compile(r"model-\d+-of-(\d+)\.safetensors")
_LENGTH_BYTES = 8
MAX_JSON_BYTES = 200 * 2**20
"""Maximum size of a JSON file: twice the size of the index of a model with a million tensors."""
_MAX_SHARDS = 10_000
_MAX_HEADER_BYTES = 100 * 10**6
"""The limit of the safetensors library."""
PROCESSORS = ("preprocessor_config.json", "processor_config.json")
"""Files with the settings of an image processor. A vision model has one of them, or both."""


class ModelError(Exception):
    """A model cannot be fetched or used. The text is one line that is shown to the user."""


def check_folder(folder: Path, kind: str | None = None) -> None:
    """Check that a folder holds a complete model and no code.

    Args:
        kind: the kind as which it is served; None for the kind of its files.

    Raises:
        ModelError: something is missing or not allowed; the text names the first problem.
    """
    check_complete(folder, kind)
    # The code would not be run here, but other tools may run it.
    if code := sorted(path.name for path in folder.iterdir() if path.suffix in CODE):
        kind = "Python code" if code[0].endswith(".py") else "a pickle file, which can run code"
        raise ModelError(
            f"{folder} contains {kind} ({code[0]!a}), which is not allowed; scripts/fetch_model --copy omits it"
        )


def check_complete(folder: Path, kind: str | None = None) -> None:
    """Check that a folder holds a complete model. Other files are ignored.

    Args:
        kind: the kind as which it is served; None for the kind of its files.

    Raises:
        ModelError: something is missing or not allowed; the text names the first problem.
    """
    if not folder.is_dir():
        raise ModelError(f"{folder} is not a folder")
    check_config(folder)
    for shard in weight_files(folder):
        check_whole(folder / shard)
    if not any(all((folder / name).is_file() for name in names) for names in _TOKENIZERS):
        raise ModelError(f"{folder} has no tokenizer (tokenizer.json, tokenizer.model, or vocab.json and merges.txt)")
    if (kind or model_kind(folder)) == "vision" and not any((folder / name).is_file() for name in PROCESSORS):
        raise ModelError(f"{folder} holds a vision model but lacks {PROCESSORS[0]}")


def check_config(folder: Path) -> None:
    """Check a model's config.json, which is available before the weights are downloaded.

    Raises:
        ModelError: something is missing or not allowed.
    """
    config = read_object(folder / "config.json")
    if not isinstance(config.get("model_type"), str) or not config["model_type"]:
        raise ModelError(f"{folder / 'config.json'} has no model_type")
    if "model_file" in config:
        raise ModelError(f"{folder} needs its own code ({_shown(config['model_file'])}), which is not allowed")


def check_adapter(folder: Path) -> None:
    """Check that a folder holds LoRA weights.

    Raises:
        ModelError: something is missing or not allowed.
    """
    read_object(folder / "adapter_config.json")
    check_whole(folder / "adapters.safetensors")


def model_kind(folder: Path) -> str:
    """Return the kind of a folder's model: `text`, `vision`, `embedding` or `rerank`.

    A vision model has an image encoder of a supported family. A decoder is an embedding model if its files are those of
    sentence-transformers, or if its name says so: converted models often lack these files, and no file of
    Qwen3-Reranker says what it is.
    """
    config = _config(folder)
    if config.get("model_type") in ENCODERS:
        return "rerank" if "SequenceClassification" in str(config.get("architectures")) else "embedding"
    if _images_supported(config) and has_vision(folder):
        return "vision"
    if named := _NAMED_KIND.search(folder.name):
        return "embedding" if named[1] else "rerank"
    return "embedding" if (folder / "modules.json").is_file() else "text"


def _images_supported(config: Mapping[str, Any]) -> bool:
    family = config.get("model_type")
    section, types = _SECTION_TYPES.get(str(family), ("", ()))
    described = config.get(section)
    kind = described.get("model_type") if isinstance(described, Mapping) else None
    return family in VISION_FAMILIES and (kind is None or kind in types)


def has_vision(folder: Path) -> bool:
    """Return whether config.json describes an image encoder, supported or not, and the weights contain it.

    Text checkpoints of multimodal models keep the `vision_config` of their origin.
    """
    if not any(map(_config(folder).get, _VISION_KEYS)):
        return False
    try:
        names = _tensor_names(folder)
    except (OSError, ModelError):  # not here, or broken: loading reports the reason
        return True
    return any(map(_VISION_TENSOR.search, names))


def _declares_vision(folder: Path) -> bool:
    return bool(_config(folder).get("vision_config"))


def _config(folder: Path) -> dict[str, Any]:
    try:
        return read_object(folder / "config.json")
    except (OSError, ModelError):
        return {}


def _tensor_names(folder: Path) -> set[str]:
    files = weight_files(folder)
    if _indexed(folder) == set(files):
        return set(read_object(folder / _INDEX)["weight_map"])
    return {name for file in files for name in safetensors_header(folder / file)}


def weight_files(folder: Path) -> list[str]:
    """Return the names of all weight files that a model library would read, in the index or not.

    Raises:
        ModelError: there are none, or the index is invalid.
    """
    indexed = _indexed(folder)
    # Without an index, mlx-vlm reads all safetensors files.
    pattern = "*.safetensors" if _declares_vision(folder) and not indexed else "model*.safetensors"
    present = {path.name for path in folder.glob(pattern)} - {"consolidated.safetensors"}
    counts = {match[1] for name in present if (match := _NUMBERED.fullmatch(name))}
    numbered = {
        f"model-{n:0{len(count)}}-of-{count}.safetensors"
        for count in counts
        for n in range(1, min(int(count), _MAX_SHARDS) + 1)
    }
    if shards := indexed | present | numbered:
        return sorted(shards)
    if pickles := sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES):
        raise ModelError(
            f"{folder} has weights only as pickle files ({pickles[0]}), which can run code and are not allowed"
        )
    raise ModelError(f"{folder} has no weights (model*.safetensors)")


def _indexed(folder: Path) -> set[str]:
    """Return the weight files that the index names; none if there is no index, or a stale one.

    An index is stale if it describes shards that were later merged into one file: model libraries read that file.
    """
    if not (folder / _INDEX).is_file():
        return set()
    weight_map = read_object(folder / _INDEX).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ModelError(f"{folder / _INDEX} has no weight_map")
    for name in weight_map.values():
        if not _is_file_name(name):
            raise ModelError(f"{folder / _INDEX} names a file outside its folder ({_shown(name)})")
        if not _SHARD.fullmatch(name):
            raise ModelError(f"{folder / _INDEX} names a file that is not a safetensors file ({_shown(name)})")
    shards = set(weight_map.values())
    merged = (folder / _WHOLE).is_file() and not any((folder / shard).exists() for shard in shards)
    return set() if merged and all(map(_NUMBERED.fullmatch, shards)) else shards


def _is_file_name(name: Any) -> bool:
    """Whether a value is a file name without a path."""
    return isinstance(name, str) and bool(name) and Path(name).name == name and "\\" not in name


def check_whole(path: Path) -> None:
    """Check a safetensors file's size against its header, which detects a truncated file without loading it."""
    header, size = safetensors_header(path), path.stat().st_size
    ranges = sorted(_byte_range(tensor, path) for name, tensor in header.items() if name != "__metadata__")
    if any(end > start for (_, end), (start, _) in pairwise(ranges)):
        raise ModelError(f"{path} is not a valid safetensors file: tensors overlap")
    expected = _data_offset(path) + max((end for _, end in ranges), default=0)
    if size != expected:
        raise ModelError(f"{path} has {size:,} of {expected:,} bytes; fetch it again")


def safetensors_header(path: Path) -> dict[str, Any]:
    """Read the header of a safetensors file: the properties of each tensor by name.

    Raises:
        ModelError: the file is missing, or its header is invalid.
    """
    if not path.is_file():
        raise ModelError(f"{path.parent} lacks the weight file {path.name}")
    end = _data_offset(path)
    if not _LENGTH_BYTES < end <= path.stat().st_size:
        raise ModelError(f"{path} is not a complete safetensors file; fetch it again")
    if end - _LENGTH_BYTES > _MAX_HEADER_BYTES:
        raise ModelError(f"{path} has a header of {end - _LENGTH_BYTES:,} bytes, more than {_MAX_HEADER_BYTES:,}")
    with path.open("rb") as file:
        file.seek(_LENGTH_BYTES)
        return _parse_object(file.read(end - _LENGTH_BYTES), path)


def _data_offset(path: Path) -> int:
    """Return the offset of the tensor data, which follows the header."""
    with path.open("rb") as file:
        return _LENGTH_BYTES + int.from_bytes(file.read(_LENGTH_BYTES), "little")


def _byte_range(tensor: Any, path: Path) -> tuple[int, int]:
    """Return start and end of a tensor, relative to the tensor data."""
    match tensor:
        case {"data_offsets": [int(start), int(end)]} if 0 <= start <= end:
            return start, end
    raise ModelError(f"{path} is not a valid safetensors file: a tensor has no valid data_offsets")


def _shown(value: object) -> str:
    """Format a value from a file for an error message: ASCII, and not longer than 80 characters."""
    return ascii(value).strip("'")[:80]


def read_object(path: Path) -> dict[str, Any]:
    """Read a file with a JSON object.

    Raises:
        ModelError: it is missing, too large or not a JSON object.
    """
    if not path.is_file():
        raise ModelError(f"{path.parent} has no {path.name}")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ModelError(f"{path} is larger than {MAX_JSON_BYTES:,} bytes")
    return _parse_object(path.read_bytes(), path)


def _parse_object(text: bytes, path: Path) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not valid JSON") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} is not a JSON object")
    return content
