"""BERT, RoBERTa and XLM-RoBERTa. The modules have the names of the weights on the hub."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import mlx.core as mx

from shared.models.folder import ModelError
from worker.runner.embedding.attention import activation, attend, group, nn, present, split_heads

_ROBERTA: Final = ("roberta", "xlm-roberta")


class BertEncoder:
    """The encoder, and the head of a cross-encoder.

    Args:
        config: config.json.
        scores: whether it has a head that scores its inputs.

    Attributes:
        module: all weights.
    """

    PREFIXES: Final = ("bert.", "roberta.")
    """Prefixes of the encoder's weights in files that also have a head."""

    def __init__(self, config: Mapping[str, Any], *, scores: bool = False) -> None:
        if config.get("position_embedding_type", "absolute") != "absolute":
            raise ModelError("only absolute position embeddings are supported for this architecture")
        hidden, norm = config["hidden_size"], config.get("layer_norm_eps", 1e-12)
        roberta = config["model_type"] in _ROBERTA
        self._first_position = config.get("pad_token_id", 1) + 1 if roberta else 0
        self._activation = activation(config.get("hidden_act", "gelu"))
        self._types = config.get("type_vocab_size", 2)
        self.hidden_size, self.heads = hidden, config["num_attention_heads"]
        self.max_tokens = config["max_position_embeddings"] - self._first_position
        self.module = group(
            embeddings=group(
                word_embeddings=nn.Embedding(config["vocab_size"], hidden),
                position_embeddings=nn.Embedding(config["max_position_embeddings"], hidden),
                token_type_embeddings=nn.Embedding(self._types, hidden),
                LayerNorm=nn.LayerNorm(hidden, norm),
            ),
            encoder=group(layer=[_layer(config, norm) for _ in range(config["num_hidden_layers"])]),
        )
        if scores and roberta:
            self.module.classifier = group(dense=nn.Linear(hidden, hidden), out_proj=nn.Linear(hidden, 1))
        elif scores:
            self.module.pooler = group(dense=nn.Linear(hidden, hidden))
            self.module.classifier = nn.Linear(hidden, 1)

    def __call__(self, tokens: mx.array, lengths: mx.array, second: mx.array) -> mx.array:
        """Return the hidden states, rows × tokens × hidden.

        Args:
            tokens: rows × tokens, padded on the right.
            lengths: tokens of each row.
            second: index of the first token of each row's second text; its length if it has only one.
        """
        parts = self.module.embeddings
        columns = mx.arange(tokens.shape[1])
        types = (columns[None] >= second[:, None]) & (columns[None] < lengths[:, None]) & (self._types > 1)
        states: mx.array = parts.word_embeddings(tokens) + parts.token_type_embeddings(types.astype(mx.int32))
        states = parts.LayerNorm(states + parts.position_embeddings(columns + self._first_position))
        mask = present(lengths, tokens.shape[1])[:, None, None]
        for layer in self.module.encoder.layer:
            states = self._apply(layer, states, mask)
        return states

    def _apply(self, layer: Any, states: mx.array, mask: mx.array) -> mx.array:
        """Apply attention and a feed-forward network, each followed by a normalisation."""
        projections, output = layer.attention["self"], layer.attention.output
        queries, keys, values = (
            split_heads(projections[name](states), self.heads) for name in ("query", "key", "value")
        )
        states = output.LayerNorm(states + output.dense(attend(queries, keys, values, mask)))
        inner = self._activation(layer.intermediate.dense(states))
        result: mx.array = layer.output.LayerNorm(states + layer.output.dense(inner))
        return result

    def score(self, states: mx.array, _lengths: mx.array) -> mx.array:
        """Return the logit of each row."""
        first, classifier = states[:, 0], self.module.classifier
        if "pooler" in self.module:
            logits: mx.array = classifier(mx.tanh(self.module.pooler.dense(first)))
        else:
            logits = classifier.out_proj(mx.tanh(classifier.dense(first)))
        return logits[:, 0]


def _layer(config: Mapping[str, Any], norm: float) -> Any:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    projections = group(**{name: nn.Linear(hidden, hidden) for name in ("query", "key", "value")})
    output = group(dense=nn.Linear(hidden, hidden), LayerNorm=nn.LayerNorm(hidden, norm))
    return group(
        attention=group(self=projections, output=output),
        intermediate=group(dense=nn.Linear(hidden, inner)),
        output=group(dense=nn.Linear(inner, hidden), LayerNorm=nn.LayerNorm(hidden, norm)),
    )
