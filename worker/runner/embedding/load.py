"""Loads embedding models and rerankers.

BERT, RoBERTa, XLM-R and ModernBERT are encoders of this package. mlx-lm loads decoders, such as Qwen3-Embedding and
Qwen3-Reranker.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any, Final

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm import utils
from tokenizers import Tokenizer

from shared.jobs.request import EMBED, RERANK
from shared.models.catalog import CatalogModel
from shared.models.facts import context_of
from shared.models.folder import ModelError, check_folder, weight_files
from shared.models.registry import ModelCard
from shared.settings import Settings
from shared.tokenizing.inputs import QWEN3_RERANKER
from worker.models.load import FALLBACK_CONTEXT, LoadedModel, contained, convert
from worker.runner import cpu_attention
from worker.runner.embedding.attention import nn
from worker.runner.embedding.bert import BertEncoder
from worker.runner.embedding.model import CausalEncoder, EmbeddingModel
from worker.runner.embedding.modernbert import ModernBertEncoder
from worker.runner.embedding.pooling import Pooling
from worker.runner.embedding.runner import EmbeddingRunner
from worker.runner.loading import READ_SHARE, free_memory, read_weights

_ENCODERS: Final[Mapping[str, Callable[..., BertEncoder | ModernBertEncoder]]] = {
    "bert": BertEncoder,
    "roberta": BertEncoder,
    "xlm-roberta": BertEncoder,
    "modernbert": ModernBertEncoder,
}
_UNUSED: Final = ("pooler.", "cls.", "lm_head.", "head.", "decoder.", "classifier.")
"""Weights of heads for other tasks, which an embedding model does not need."""
_BUFFERS: Final = ("embeddings.position_ids", "embeddings.token_type_ids")
_OLD_NAMES: Final = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
_UNSUPPORTED: Final = {"adapter": "adapter", "draft": "draft_model", "kv_bits": "kv_bits"}
"""Options of the catalog that these models do not have, by the attribute of `CatalogModel`."""


def load(settings: Settings, entry: CatalogModel) -> Generator[float, None, EmbeddingRunner]:
    """Load and warm an embedding model or a reranker.

    Yields:
        The progress, 0 to 1.

    Raises:
        ModelError: the model cannot be served.
    """
    for attribute, option in _UNSUPPORTED.items():
        if getattr(entry, attribute) is not None:
            raise ModelError(f"{entry.path}: a model of the kind {entry.kind!r} has no `{option}`; remove it.")
    cpu_attention.install()
    check_folder(entry.path, entry.kind)
    with contained(f"The model in {entry.path} cannot be loaded"):
        model = load_embedding_model(entry.path, entry.kind)
        card = _card(entry, model)
    convert(LoadedModel(model.module, None, model.config, card, frozenset()), entry.dtype, entry.quantize_bits)
    yield from read_weights(model.module, entry)
    max_bytes = free_memory(settings)
    mx.set_memory_limit(mx.get_active_memory() + max_bytes)
    runner = EmbeddingRunner(model, card, max_bytes)
    if runner.row_bytes(1) > max_bytes:
        raise ModelError(f"{entry.path} leaves no memory for jobs; raise MEMORY_LIMIT_BYTES or choose a smaller model.")
    for _ in runner.warming():
        yield READ_SHARE
    return runner


def load_embedding_model(folder: Path, kind: str) -> EmbeddingModel:
    """Return the model in a folder. Its weights are read only when they are evaluated.

    Args:
        kind: `EMBED` or `RERANK`.

    Raises:
        Exception: of any type, if the folder is broken or the model is not supported.
    """
    config = utils.load_config(folder)
    if config["model_type"] in _ENCODERS:
        return _encoder(folder, config, kind)
    return _decoder(folder, config, kind)


def _encoder(folder: Path, config: dict[str, Any], kind: str) -> EmbeddingModel:
    scores = kind == RERANK
    labels = len(config.get("id2label") or {}) or config.get("num_labels", 1)
    if scores and labels != 1:
        raise ModelError(f"{folder} sorts into {labels} classes; a reranker has one score")
    encoder = _ENCODERS[config["model_type"]](config, scores=scores)
    weights = _weights(folder, encoder.PREFIXES, scores)
    _load_weights(encoder.module, weights, config)
    pooling = None if scores else Pooling.declared(folder, "mean")
    return EmbeddingModel(encoder, encoder.module, config, pooling, config["intermediate_size"])


def _weights(folder: Path, prefixes: tuple[str, ...], scores: bool) -> dict[str, mx.array]:
    """Return the weights that the encoder needs, under its own names."""
    weights: dict[str, mx.array] = {}
    for file in weight_files(folder):
        weights |= mx.load(str(folder / file))  # type: ignore[arg-type]
    named = {_own_name(name, prefixes): array for name, array in weights.items()}
    unused = _BUFFERS if scores else (*_BUFFERS, *_UNUSED)
    return {name: array for name, array in named.items() if not name.startswith(unused)}


def _own_name(name: str, prefixes: tuple[str, ...]) -> str:
    for prefix in prefixes:
        name = name.removeprefix(prefix)
    for old, new in _OLD_NAMES.items():
        name = name.removesuffix(old) + new if name.endswith(old) else name
    return name


def _load_weights(module: Any, weights: Mapping[str, mx.array], config: Mapping[str, Any]) -> None:
    if quantization := config.get("quantization"):
        quantized = {name.removesuffix(".scales") for name in weights if name.endswith(".scales")}
        nn.quantize(
            module,
            group_size=quantization["group_size"],
            bits=quantization["bits"],
            class_predicate=lambda path, _: path in quantized,
        )
    module.load_weights(list(weights.items()), strict=True)


def _decoder(folder: Path, config: dict[str, Any], kind: str) -> EmbeddingModel:
    """Load a decoder. Embedding models have no output layer, and name their weights with or without `model.`."""
    changes = {"tie_word_embeddings": True} if kind == EMBED else {}
    model, config = utils.load_model(folder, lazy=True, model_config=changes, get_model_classes=_classes)
    if not hasattr(model, "model"):
        raise ModelError(f"the architecture {config['model_type']!r} is not supported for embeddings")
    if config.get("use_bidirectional_attention") or config.get("is_causal") is False:
        raise ModelError("its attention reads in both directions, which is supported only for encoders")
    choices = _choices(folder) if kind == RERANK else None
    encoder = CausalEncoder(model, context_of(config, None) or FALLBACK_CONTEXT, choices)
    pooling = None if kind == RERANK else Pooling.declared(folder, "last")
    inner: int = getattr(model.args, "intermediate_size", None) or 4 * encoder.hidden_size
    return EmbeddingModel(encoder, model, config, pooling, inner)


def _classes(config: dict[str, Any]) -> tuple[Any, Any]:
    """Return mlx-lm's classes; the model also accepts names of weights without the prefix `model.`."""
    architecture, arguments = utils._get_classes(config)  # noqa: SLF001 - there is no other way

    class Decoder(architecture):  # type: ignore[misc, valid-type]
        def sanitize(self, weights: dict[str, Any]) -> dict[str, Any]:
            if not any(name.startswith("model.") for name in weights):
                weights = {name if name.startswith("lm_head.") else f"model.{name}": weights[name] for name in weights}
            return super().sanitize(weights) if hasattr(architecture, "sanitize") else weights

    Decoder.__module__ = architecture.__module__
    return Decoder, arguments


def _choices(folder: Path) -> tuple[int, int]:
    """Return the ids of the tokens `yes` and `no`."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    yes, no = tokenizer.token_to_id("yes"), tokenizer.token_to_id("no")
    if yes is None or no is None:
        raise ModelError("the tokenizer has no tokens `yes` and `no`, with which a reranker of this kind answers")
    return yes, no


def _card(entry: CatalogModel, model: EmbeddingModel) -> ModelCard:
    pooling = model.pooling
    limit = min(model.encoder.max_tokens, (pooling and pooling.max_tokens) or model.encoder.max_tokens)
    if not (entry.path / "tokenizer.json").is_file():
        raise ModelError(f"{entry.path} has no tokenizer.json, which models of the kind {entry.kind!r} need")
    if entry.context is not None and entry.context > model.encoder.max_tokens:
        raise ModelError(
            f"{entry.path}: `context` is {entry.context}, but the model reads at most {model.encoder.max_tokens} tokens"
        )
    decoder = isinstance(model.encoder, CausalEncoder)
    return ModelCard(
        id=entry.path.name,
        kind=entry.kind,
        context=limit,
        vocabulary=_vocabulary(model),
        dimensions=model.encoder.hidden_size if pooling else None,
        pair_template=QWEN3_RERANKER if entry.kind == RERANK and decoder else None,
        prompts=dict(pooling.prompts or {}) if pooling else None,
        default_prompt=pooling.default_prompt if pooling else None,
        adapters={},
    )


def _vocabulary(model: EmbeddingModel) -> int:
    """Return how many tokens the embedding has. With a larger id, MLX would read outside of the array."""
    named: dict[str, mx.array] = dict(tree_flatten(model.module.parameters()))
    names = ("word_embeddings.weight", "tok_embeddings.weight", "embed_tokens.weight")
    rows = [array.shape[0] for name, array in named.items() if name.endswith(names)]
    return min(rows, default=int(model.config["vocab_size"]))
