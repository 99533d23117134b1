"""From hidden states to vectors: pooling, Matryoshka dimensions and normalisation, as the model's files declare."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

import mlx.core as mx
import numpy as np

from shared.models.folder import ModelError
from worker.runner.embedding.attention import present

Vector: TypeAlias = np.ndarray[Any, np.dtype[np.float32]]
_SMALLEST: Final = 1e-12
_MODES: Final = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last",
    "pooling_mode_max_tokens": "max",
}
"""Fields of `1_Pooling/config.json`."""


@dataclass(frozen=True, slots=True)
class Pooling:
    """How a vector is made of an input's hidden states.

    Attributes:
        mode: `cls`, `mean`, `last` or `max`.
        normalize: whether vectors have the length 1.
        max_tokens: maximum tokens of an input, declared for the whole model; None if only the encoder limits them.
        prompts: texts that requests can name and that are put before inputs.
        default_prompt: name of the prompt for requests that name none; None for no prompt.
    """

    mode: str
    normalize: bool = True
    max_tokens: int | None = None
    prompts: Mapping[str, str] | None = None
    default_prompt: str | None = None

    @classmethod
    def declared(cls, folder: Path, default: str) -> Pooling:
        """Read the files of sentence-transformers in a folder.

        Args:
            default: the mode if there are none.

        Raises:
            ModelError: they need something that is not supported.
        """
        limit = _read(folder / "sentence_bert_config.json").get("max_seq_length")
        prompts = _read(folder / "config_sentence_transformers.json")
        modules = _modules(folder)
        if modules is None:
            mode, normalize = default, True
        else:
            path = next((path for kind, path in modules if kind == "Pooling"), "1_Pooling")
            mode, normalize = (
                _mode(folder / path / "config.json", default),
                any(kind == "Normalize" for kind, _ in modules),
            )
        return cls(
            mode,
            normalize,
            limit if isinstance(limit, int) and limit > 0 else None,
            {name: text for name, text in (prompts.get("prompts") or {}).items() if isinstance(text, str)},
            prompts.get("default_prompt_name"),
        )

    def vectors(self, states: mx.array, lengths: mx.array) -> mx.array:
        """Return a vector for each row, in float32 and not yet normalised."""
        if self.mode in ("cls", "last"):
            return pool(states, lengths, self.mode).astype(mx.float32)
        return pool(states.astype(mx.float32), lengths, self.mode)


def pool(states: mx.array, lengths: mx.array, mode: str) -> mx.array:
    """Return one vector for each row: rows × hidden.

    Args:
        states: rows × tokens × hidden.
    """
    if mode == "cls":
        return states[:, 0]
    if mode == "last":
        return states[mx.arange(states.shape[0]), lengths - 1]
    tokens = present(lengths, states.shape[1])[..., None]
    if mode == "max":
        return mx.where(tokens, states, -mx.inf).max(axis=1)
    return mx.where(tokens, states, 0.0).sum(axis=1) / lengths[:, None].astype(states.dtype)


def normalized(vector: Vector) -> Vector:
    """Scale a vector to the length 1. A vector of zeros stays as it is."""
    return vector / np.float32(max(float(np.linalg.norm(vector)), _SMALLEST))


def _modules(folder: Path) -> list[tuple[str, str]] | None:
    """Return kind and path of the modules that sentence-transformers applies; None if the folder declares none."""
    file = folder / "modules.json"
    if not file.is_file():
        return None
    try:
        entries = [(str(each["type"]).rpartition(".")[2], str(each["path"])) for each in json.loads(file.read_bytes())]
    except (ValueError, TypeError, LookupError) as error:
        raise ModelError(f"{file} is not a list of modules") from error
    if others := [kind for kind, _ in entries if kind not in ("Transformer", "Pooling", "Normalize")]:
        raise ModelError(f"{file}: the module {others[0]!a} is not supported")
    return entries


def _mode(file: Path, default: str) -> str:
    config = _read(file)
    if not config:
        return default
    newer = config.get("pooling_mode")  # newer versions of sentence-transformers write a single field
    chosen = [mode for name, mode in _MODES.items() if config.get(name)]
    if isinstance(newer, str):
        chosen = [{"lasttoken": "last"}.get(newer, newer)]
    unknown = [name for name, value in config.items() if name.startswith("pooling_mode_") and value is True]
    if len(chosen) != 1 or chosen[0] not in _MODES.values() or set(unknown) - _MODES.keys():
        raise ModelError(f"{file}: this pooling is not supported; supported is one of {', '.join(_MODES)}")
    return chosen[0]


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read") from error
    return content if isinstance(content, dict) else {}
