"""ModernBERT. The modules have the names of the weights on the hub."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import mlx.core as mx

from shared.models.folder import ModelError
from worker.runner.embedding.attention import activation, attend, group, nn, present, split_heads
from worker.runner.embedding.pooling import pool


class ModernBertEncoder:
    """The encoder, and the head of a cross-encoder.

    Args:
        config: config.json.
        scores: whether it has a head that scores its inputs.

    Attributes:
        module: all weights.
    """

    PREFIXES: Final = ("model.",)
    """Prefixes of the encoder's weights in files that also have a head."""

    def __init__(self, config: Mapping[str, Any], *, scores: bool = False) -> None:
        hidden, count = config["hidden_size"], config["num_hidden_layers"]
        self.hidden_size, self.heads = hidden, config["num_attention_heads"]
        self.max_tokens = config["max_position_embeddings"]
        self._window = config.get("local_attention", 128) // 2
        self._local = [_is_local(config, index) for index in range(count)]
        self._bases = [_rope_base(config, local) for local in self._local]
        self._activation = activation(config.get("hidden_activation", "gelu"))
        self.module = group(
            embeddings=group(tok_embeddings=nn.Embedding(config["vocab_size"], hidden), norm=_norm(config)),
            layers=[_layer(config, first=index == 0) for index in range(count)],
            final_norm=_norm(config),
        )
        if scores:
            bias = config.get("classifier_bias", False)
            self.module.head = group(dense=nn.Linear(hidden, hidden, bias=bias), norm=_norm(config))
            self.module.classifier = nn.Linear(hidden, 1)
            self._head_activation = activation(config.get("classifier_activation", "gelu"))
            self._head_pooling = config.get("classifier_pooling", "cls")
            if self._head_pooling not in ("cls", "mean"):
                raise ModelError(f"the pooling {self._head_pooling!r} is not supported")

    def __call__(self, tokens: mx.array, lengths: mx.array, _second: mx.array) -> mx.array:
        """Return the hidden states, rows × tokens × hidden. There are no types of tokens; see `BertEncoder`."""
        parts = self.module.embeddings
        states: mx.array = parts.norm(parts.tok_embeddings(tokens))
        columns = mx.arange(tokens.shape[1])
        everywhere = present(lengths, tokens.shape[1])[:, None, None]
        near = everywhere & (mx.abs(columns[:, None] - columns[None]) <= self._window)[None, None]
        for layer, local, base in zip(self.module.layers, self._local, self._bases, strict=True):
            states = self._apply(layer, states, near if local else everywhere, base)
        result: mx.array = self.module.final_norm(states)
        return result

    def _apply(self, layer: Any, states: mx.array, mask: mx.array, base: float) -> mx.array:
        """Apply attention and a gated feed-forward network, each preceded by a normalisation.

        The first layer has none before its attention: the embeddings are normalised already.
        """
        normed = layer.attn_norm(states) if "attn_norm" in layer else states
        queries, keys, values = (
            split_heads(part, self.heads) for part in mx.split(layer.attn.Wqkv(normed), 3, axis=-1)
        )
        states = states + layer.attn.Wo(attend(_rotated(queries, base), _rotated(keys, base), values, mask))
        inner, gate = mx.split(layer.mlp.Wi(layer.mlp_norm(states)), 2, axis=-1)
        result: mx.array = states + layer.mlp.Wo(self._activation(inner) * gate)
        return result

    def score(self, states: mx.array, lengths: mx.array) -> mx.array:
        """Return the logit of each row."""
        head = self.module.head
        pooled = head.norm(self._head_activation(head.dense(pool(states, lengths, self._head_pooling))))
        logits: mx.array = self.module.classifier(pooled)
        return logits[:, 0]


def _layer(config: Mapping[str, Any], *, first: bool) -> Any:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    bias, mlp_bias = config.get("attention_bias", False), config.get("mlp_bias", False)
    layer = group(
        attn=group(Wqkv=nn.Linear(hidden, 3 * hidden, bias=bias), Wo=nn.Linear(hidden, hidden, bias=bias)),
        mlp_norm=_norm(config),
        mlp=group(Wi=nn.Linear(hidden, 2 * inner, bias=mlp_bias), Wo=nn.Linear(inner, hidden, bias=mlp_bias)),
    )
    if not first:
        layer.attn_norm = _norm(config)
    return layer


def _rotated(part: mx.array, base: float) -> mx.array:
    return mx.fast.rope(part, part.shape[-1], traditional=False, base=base, scale=1.0, offset=0)


def _norm(config: Mapping[str, Any]) -> Any:
    return nn.LayerNorm(config["hidden_size"], config.get("norm_eps", 1e-5), bias=config.get("norm_bias", False))


def _is_local(config: Mapping[str, Any], index: int) -> bool:
    """Whether a layer attends only to near tokens. Newer versions of transformers write a list of types."""
    types = config.get("layer_types")
    if types:
        return bool(types[index] == "sliding_attention")
    return bool(index % config.get("global_attn_every_n_layers", 3))


def _rope_base(config: Mapping[str, Any], local: bool) -> float:
    newer = (config.get("rope_parameters") or {}).get("sliding_attention" if local else "full_attention") or {}
    older = config.get("local_rope_theta", 10_000.0) if local else config.get("global_rope_theta", 160_000.0)
    return float(newer.get("rope_theta") or older or config.get("global_rope_theta", 160_000.0))
