"""A model folder, read: weights, tokenizer, and what the API must know of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from shared.models.facts import GROUP, context_of
from shared.models.folder import ModelError, check_adapter, check_folder
from shared.models.registry import ModelCard, digest

FALLBACK_CONTEXT = 4096
"""Tokens of context of a model that does not say."""

NO_CODE: Final = {"trust_remote_code": False}
"""For tokenizers and processors: unless it is said, transformers asks at the terminal whether to run a model's code."""


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


def load_model(folder: Path, *, adapter: Path | None = None, lazy: bool = False) -> LoadedModel:
    """Load an MLX model folder. To be called on the thread that will use the model.

    Args:
        adapter: a folder of LoRA weights to put on top.
        lazy: leave the weights to be read when they are evaluated.

    Raises:
        ModelError: there is no such folder, or something in it is missing or cannot be used.
    """
    check_folder(folder)
    if adapter is not None:
        check_adapter(adapter)
    from mlx_lm import load

    try:
        model, tokenizer, config = load(  # type: ignore[misc]
            str(folder), NO_CODE, adapter_path=str(adapter) if adapter else None, lazy=lazy, return_config=True
        )
    except Exception as error:  # a broken folder makes the libraries raise anything
        raise ModelError(f"The model in {folder} cannot be loaded: {first_line(error)}") from error
    return loaded_as("text", folder, model, tokenizer, config)


def convert(loaded: LoadedModel, dtype: str | None, bits: int | None) -> None:
    """Change the type of the weights, or pack them; what is packed already stays as it is. Computes nothing yet.

    Raises:
        ModelError: the model cannot be packed.
    """
    import mlx.core as mx
    from mlx.nn import quantize  # type: ignore[attr-defined]  # MLX has no types for it

    if dtype is not None:
        loaded.model.set_dtype(getattr(mx, dtype))
    if bits is not None and not loaded.config.get("quantization"):
        try:
            quantize(loaded.model, group_size=GROUP, bits=bits, class_predicate=_can_be_packed)
        except Exception as error:
            raise ModelError(f"The model cannot be packed to {bits} bits: {first_line(error)}") from error
        loaded.config["quantization"] = {"group_size": GROUP, "bits": bits}


def _can_be_packed(_path: str, module: Any) -> bool:
    return hasattr(module, "to_quantized") and module.weight.shape[-1] % GROUP == 0


def loaded_as(kind: str, folder: Path, model: Any, tokenizer: Any, config: dict[str, Any]) -> LoadedModel:
    """A model of that kind, with its card."""
    card = ModelCard(
        id=folder.name,
        kind=kind,
        context=context_of(config, tokenizer.model_max_length) or FALLBACK_CONTEXT,
        chat_template=tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None,
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        tokenizer=digest(file.read_text(encoding="utf-8")) if (file := folder / "tokenizer.json").exists() else None,
    )
    return LoadedModel(model, tokenizer, config, card, frozenset(tokenizer.eos_token_ids))


def first_line(error: BaseException) -> str:
    """What an exception says, in one line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
