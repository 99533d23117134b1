"""Loads a model folder: weights, tokenizer, and the card that the API needs."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from shared.models.facts import GROUP, context_of, declared_coordinates, separate_template
from shared.models.folder import ModelError, check_adapter, check_folder, has_vision
from shared.models.registry import ModelCard
from shared.models.sampling_defaults import SamplingDefaults
from worker.output.format import PLAIN, MessageFormat, message_format

T = TypeVar("T")

FALLBACK_CONTEXT = 32_768
"""Context in tokens of a model that has no limit on positions, such as a recurrent one, or declares none."""

TOKEN_EMBEDDINGS: Final = (
    *("embed_tokens", "embeddings", "embedding", "embed", "embed_in", "word_embeddings", "wte"),
    *("tok_embeddings", "token_embeddings"),
)
"""Names of the input embedding in mlx-lm's models. Others are embeddings of positions, n-grams and layers."""

NO_CODE: Final = {"trust_remote_code": False}
"""Options for tokenizers and processors. Without them, transformers asks on the terminal whether to run model code."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in memory.

    Attributes:
        model: the mlx-lm model, weights evaluated.
        tokenizer: mlx-lm's wrapper of the tokenizer.
        config: `config.json` as mlx-lm reads it.
        eos: ids of the tokens that end an answer, including those of `generation_config.json`.
        message_format: how the model marks reasoning and tool calls in its text.
    """

    model: Any
    tokenizer: Any
    config: dict[str, Any]
    card: ModelCard
    eos: frozenset[int]
    message_format: MessageFormat = PLAIN


def load_model(folder: Path, *, adapter: Path | None = None, lazy: bool = False) -> LoadedModel:
    """Load an MLX model folder. Call it on the thread that will use the model.

    Args:
        adapter: a folder of LoRA weights to apply.
        lazy: read the weights only when they are evaluated.

    Raises:
        ModelError: the folder does not exist, or a file in it is missing or cannot be used.
    """
    check_folder(folder, "text")
    if adapter is not None:
        check_adapter(adapter)
    from worker.models import text_half

    with contained(f"The model in {folder} cannot be loaded"):
        model, tokenizer, config = text_half.load(folder, tokenizer_config(folder), adapter=adapter, lazy=lazy)
    return loaded_as("text", folder, model, tokenizer, config)


def convert(loaded: LoadedModel, dtype: str | None, bits: int | None) -> None:
    """Change the type of the weights, or quantise them unless they are quantised already. Computes nothing yet.

    The model's own predicates decide which weights keep their type, and which are quantised with more bits or not at
    all, as in mlx-lm's `convert`: the router of a mixture of experts, for example, or the decay of a recurrent state.

    Args:
        bits: bits per weight; None: do not quantise.

    Raises:
        ModelError: the model cannot be quantised.
    """
    import mlx.core as mx
    from mlx.nn import quantize  # type: ignore[attr-defined]  # MLX has no types for it

    if dtype is not None:
        _cast(loaded.model, getattr(mx, dtype))
    if bits is not None and not loaded.config.get("quantization"):
        with contained(f"The model cannot be quantised to {bits} bits"):
            quantize(loaded.model, group_size=GROUP, bits=bits, class_predicate=_quantisation_of(loaded.model))
        loaded.config["quantization"] = {"group_size": GROUP, "bits": bits}


def _cast(model: Any, dtype: Any) -> None:
    import mlx.core as mx
    from mlx.utils import tree_map_with_path

    may_cast: Callable[[str], bool] = getattr(model, "cast_predicate", None) or (lambda _path: True)

    def cast(path: str, array: Any) -> Any:
        return array.astype(dtype) if may_cast(path) and mx.issubdtype(array.dtype, mx.floating) else array

    model.update(tree_map_with_path(cast, model.parameters()))


def _quantisation_of(model: Any) -> Callable[[str, Any], bool | dict[str, Any]]:
    """Return a function that says, for the path of a module, whether to quantise it, or with which parameters."""
    chosen: Callable[[str, Any], bool | dict[str, Any]] = getattr(model, "quant_predicate", None) or (lambda *_: True)

    def quantisation(path: str, module: Any) -> bool | dict[str, Any]:
        possible = hasattr(module, "to_quantized") and module.weight.shape[-1] % GROUP == 0
        return possible and chosen(path, module)

    return quantisation


def loaded_as(kind: str, folder: Path, model: Any, tokenizer: Any, config: dict[str, Any]) -> LoadedModel:
    """Return a model of a kind (`text` or `vision`) with its card."""
    form = message_format(tokenizer)
    card = ModelCard(
        id=folder.name,
        kind=kind,
        context=context_of(config, tokenizer.model_max_length) or _default_context(model) or FALLBACK_CONTEXT,
        chat_template=tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None,
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        text_only=kind == "text" and has_vision(folder),
        sampling=SamplingDefaults.declared(folder).model_dump(exclude_none=True),
        vocabulary=_embedding_rows(model) or _declared_vocabulary(config) or len(tokenizer),
        reasoning=form.marks_reasoning,
        tool_format=form.tool.card_name if form.tool else None,
        coordinates=declared_coordinates(folder).value,
    )
    return LoadedModel(model, tokenizer, config, card, frozenset(tokenizer.eos_token_ids), form)


def tokenizer_config(folder: Path) -> dict[str, Any]:
    """Return the options with which a folder's tokenizer is loaded."""
    template = separate_template(folder)
    return {**NO_CODE, "chat_template": template} if template else dict(NO_CODE)


def _default_context(model: Any) -> int | None:
    """Return the context that mlx-lm assumes for an architecture whose config.json may omit it."""
    arguments = getattr(model, "args", None)
    return context_of(vars(arguments), None) if hasattr(arguments, "__dict__") else None


def _embedding_rows(model: Any) -> int | None:
    """Return the number of tokens that a model can read. With a larger id, MLX would read outside of the array.

    config.json may leave it out, or state that of the tokenizer.
    """
    from mlx.nn import Embedding, QuantizedEmbedding  # type: ignore[attr-defined]

    rows = (
        int(module.weight.shape[0])
        for path, module in model.named_modules()
        if isinstance(module, Embedding | QuantizedEmbedding) and path.rpartition(".")[2] in TOKEN_EMBEDDINGS
    )
    return min(rows, default=None)


def _declared_vocabulary(config: Mapping[str, Any]) -> int | None:
    return config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")


def tokenizer_defaults(folder: Path) -> dict[str, Any] | None:
    """Return mlx-lm's tokenizer defaults for a model's architecture, for `worker.models.tokenizer_helper`."""
    from mlx_lm import utils

    with contained(f"The model in {folder} cannot be loaded"):
        defaults: dict[str, Any] | None = utils._tokenizer_defaults(folder)  # noqa: SLF001 - there is no other way
    return defaults


@contextmanager
def contained(what: str) -> Iterator[None]:
    """Turn any exception that a model library raises for a folder into one line for the user.

    For a broken folder the libraries raise exceptions of any type. Some of their modules call `sys.exit` when they are
    imported, and the tokenizer library panics. Neither is an `Exception`, and neither must end the worker and its other
    models.

    Args:
        what: the beginning of the line.

    Raises:
        ModelError: with that line.
    """
    try:
        yield
    except (ModelError, KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:
        raise ModelError(f"{what}: {first_line(error)}") from error


def never_exits(load: Callable[[], Generator[float, None, T] | T], folder: Path) -> Generator[float, None, T]:
    """Load and warm a model with `load`; turn an exception that would end the process into a `ModelError`."""
    try:
        loaded = load()
        return (yield from loaded) if isinstance(loaded, Generator) else loaded
    except (Exception, KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:
        raise ModelError(f"The model in {folder} cannot be loaded: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """Return an exception's message in one line."""
    if isinstance(error, SystemExit):
        return f"its library would end the process (exit status {error.code})"
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def measure_gflops(size: int = 1024, budget_s: float = 0.2, max_products: int = 20) -> float:
    """Return billions of float32 operations per second: the best of several products of square matrices.

    Call it on the thread that owns MLX. It returns after `budget_s`, or after one product if that takes longer.

    Args:
        size: rows and columns; small enough to be quick, large enough to keep every core busy.
        budget_s: time after which no further product is begun.
    """
    import mlx.core as mx

    left, right = mx.ones((size, size)), mx.full((size, size), 0.5)
    mx.eval(left, right)
    best = float("inf")
    end = time.perf_counter() + budget_s
    for _ in range(max_products):
        start = time.perf_counter()
        mx.eval(left @ right)
        now = time.perf_counter()
        best = min(best, now - start)
        if now >= end:
            break
    return 2 * size**3 / best / 1e9
