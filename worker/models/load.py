"""A model folder, read: weights, tokenizer, and what the API must know of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from shared.models.facts import GROUP, context_of
from shared.models.folder import ModelError, check_adapter, check_folder
from shared.models.registry import ModelCard

T = TypeVar("T")

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
    check_folder(folder, "text")
    if adapter is not None:
        check_adapter(adapter)
    from mlx_lm import load

    with contained(f"The model in {folder} cannot be loaded"):
        model, tokenizer, config = load(  # type: ignore[misc]
            str(folder), NO_CODE, adapter_path=str(adapter) if adapter else None, lazy=lazy, return_config=True
        )
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
        with contained(f"The model cannot be packed to {bits} bits"):
            quantize(loaded.model, group_size=GROUP, bits=bits, class_predicate=_can_be_packed)
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
    )
    return LoadedModel(model, tokenizer, config, card, frozenset(tokenizer.eos_token_ids))


def tokenizer_defaults(folder: Path) -> dict[str, Any] | None:
    """What mlx-lm's model says of tokenizers that do not say it themselves, for `worker.models.tokenizer_helper`."""
    from mlx_lm import utils

    with contained(f"The model in {folder} cannot be loaded"):
        found: dict[str, Any] | None = utils._tokenizer_defaults(folder)  # noqa: SLF001 - there is no other way
    return found


@contextmanager
def contained(what: str) -> Iterator[None]:
    """Turn anything that model libraries raise for a folder into one line for the user.

    They raise anything for a broken folder. Some of their modules call `sys.exit` when they are imported, and the
    tokenizer library panics. Neither is an `Exception`, and neither must end the worker and its other models.

    Raises:
        ModelError: that line; it begins with `what`.
    """
    try:
        yield
    except (ModelError, KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:
        raise ModelError(f"{what}: {first_line(error)}") from error


def never_exits(load: Callable[[], Generator[float, None, T] | T], folder: Path) -> Generator[float, None, T]:
    """Load and warm a model as `load` does; what would end the process is a `ModelError`, other errors stay."""
    try:
        made = load()
        return (yield from made) if isinstance(made, Generator) else made
    except (Exception, KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:
        raise ModelError(f"The model in {folder} cannot be loaded: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """What an exception says, in one line."""
    if isinstance(error, SystemExit):
        return f"its library would end the process (exit status {error.code})"
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def measure_gflops(size: int = 1024, budget_s: float = 0.2, most: int = 20) -> float:
    """Billions of float32 operations a second: the best of several products of two `size` × `size` matrices.

    Call it on the thread that owns MLX. It ends after `budget_s`, or after one product where that takes longer.

    Args:
        size: rows and columns; small enough to be quick, large enough to keep every core busy.
        budget_s: no further product is begun after this time.
        most: products at the most.
    """
    import mlx.core as mx

    left, right = mx.ones((size, size)), mx.full((size, size), 0.5)
    mx.eval(left, right)
    best = float("inf")
    end = time.perf_counter() + budget_s
    for _ in range(most):
        start = time.perf_counter()
        mx.eval(left @ right)
        now = time.perf_counter()
        best = min(best, now - start)
        if now >= end:
            break
    return 2 * size**3 / best / 1e9
