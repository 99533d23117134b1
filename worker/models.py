"""A model folder, read: weights, tokenizer, and what the API must know of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.model_folder import ModelError, check_folder
from shared.registry import ModelCard, digest

FALLBACK_CONTEXT = 4096
"""Tokens of context of a model that does not say."""

_CONTEXT_NAMES = ("max_position_embeddings", "max_sequence_length", "max_seq_len", "n_positions", "seq_length")
_MOST_SANE = 100_000_000
"""Tokenizers without a limit say 1e30."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in memory.

    Attributes:
        model: the mlx-lm model, weights evaluated.
        tokenizer: mlx-lm's wrapper of the tokenizer.
        config: `config.json` as mlx-lm understood it.
        eos: ids of the tokens that end an answer, those of `generation_config.json` among them.
    """

    model: Any
    tokenizer: Any
    config: dict[str, Any]
    card: ModelCard
    eos: frozenset[int]


def load_model(folder: Path) -> LoadedModel:
    """Load an MLX model folder. To be called on the thread that will use the model.

    Raises:
        ModelError: there is no such folder, or something in it is missing or cannot be used.
    """
    check_folder(folder)
    from mlx_lm import load

    try:
        model, tokenizer, config = load(str(folder), return_config=True)  # type: ignore[misc]
    except Exception as error:  # a broken folder makes the libraries raise anything
        raise ModelError(f"The model in {folder} cannot be loaded: {first_line(error)}") from error
    return loaded_as("text", folder, model, tokenizer, config)


def loaded_as(kind: str, folder: Path, model: Any, tokenizer: Any, config: dict[str, Any]) -> LoadedModel:
    """A model of that kind, with its card."""
    card = ModelCard(
        id=folder.name,
        kind=kind,
        context=_context(config, tokenizer),
        chat_template=tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None,
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        tokenizer=digest(file.read_text(encoding="utf-8")) if (file := folder / "tokenizer.json").exists() else None,
    )
    return LoadedModel(model, tokenizer, config, card, frozenset(tokenizer.eos_token_ids))


def _context(config: dict[str, Any], tokenizer: Any) -> int:
    """Most tokens of prompt and answer: what the weights were made for, or less if the tokenizer says so."""
    places = (config, config.get("text_config") or {})
    said = [place[name] for place in places for name in _CONTEXT_NAMES if isinstance(place.get(name), int)]
    limit = tokenizer.model_max_length
    limits = [*said[:1], *([int(limit)] if limit and limit < _MOST_SANE else [])]
    return min(limits, default=FALLBACK_CONTEXT)


def first_line(error: Exception) -> str:
    """What an exception says, in one line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
