"""A model that turns inputs into vectors or scores, and the memory that a pass over a batch of inputs takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Protocol

import mlx.core as mx

from worker.runner.embedding.attention import block_rows
from worker.runner.embedding.pooling import Pooling, Vector, normalized

_FLOAT_BYTES: Final = 4


class Encoder(Protocol):
    """A model that reads a whole batch in one pass.

    Attributes:
        max_tokens: maximum tokens of an input.
        hidden_size: size of a token's hidden state.
        heads: number of attention heads.
    """

    max_tokens: int
    hidden_size: int
    heads: int

    def __call__(self, tokens: mx.array, lengths: mx.array, second: mx.array, /) -> mx.array:
        """Return the hidden states; see `worker.runner.embedding.bert.BertEncoder`."""
        ...

    def score(self, states: mx.array, lengths: mx.array, /) -> mx.array:
        """Return a logit for each row. Only rerankers have this method's weights."""
        ...


class CausalEncoder:
    """A decoder of mlx-lm. A token attends only to those before it, so padding on the right changes nothing.

    Args:
        model: mlx-lm's model.
        max_tokens: the model's context.
        choices: ids of the tokens that answer "yes" and "no", for a reranker; None for an embedding model.
    """

    def __init__(self, model: Any, max_tokens: int, choices: tuple[int, int] | None = None) -> None:
        self.module = model
        self.max_tokens = max_tokens
        self.hidden_size: int = model.args.hidden_size
        self.heads: int = model.args.num_attention_heads
        self._choices = choices

    def __call__(self, tokens: mx.array, _lengths: mx.array, _second: mx.array) -> mx.array:
        """See `Encoder`."""
        states: mx.array = self.module.model(tokens)
        return states

    def score(self, states: mx.array, lengths: mx.array) -> mx.array:
        """Return how much more likely the model answers "yes" than "no", as a logit."""
        last = states[mx.arange(states.shape[0]), lengths - 1]
        head: Callable[[mx.array], mx.array] = getattr(self.module, "lm_head", None) or (
            self.module.model.embed_tokens.as_linear
        )
        yes, no = self._choices or (0, 0)
        logits = head(last).astype(mx.float32)
        return logits[:, yes] - logits[:, no]


@dataclass(frozen=True, slots=True)
class EmbeddingModel:
    """An encoder with what makes vectors or scores of its hidden states.

    Attributes:
        module: all weights, as a module of MLX.
        pooling: None for a reranker.
        inner_size: size of the hidden layer of the feed-forward networks.
    """

    encoder: Encoder
    module: Any
    config: dict[str, Any]
    pooling: Pooling | None
    inner_size: int

    def compute(self, tokens: mx.array, lengths: mx.array, second: mx.array) -> mx.array:
        """Return the vectors of an embedding model, rows × hidden, or the scores of a reranker, rows × 1."""
        states = self.encoder(tokens, lengths, second)
        if self.pooling is None:
            return mx.sigmoid(self.encoder.score(states, lengths).astype(mx.float32))[:, None]
        return self.pooling.vectors(states, lengths)

    def shorten(self, vector: Vector, dimensions: int | None) -> Vector:
        """Return the first dimensions of a vector, with the length 1 if the model's vectors have it."""
        if self.pooling is None:
            return vector
        shortened = vector[:dimensions] if dimensions else vector
        return normalized(shortened) if self.pooling.normalize else shortened

    def pass_bytes(self, rows: int, length: int) -> int:
        """Estimate the temporary memory of a pass: one layer's activations and attention scores.

        Measured with tiny models on a CPU, it is 1.05 to 2 times what a pass holds (`tests/architectures`).
        """
        tokens = rows * length
        heads, hidden = self.encoder.heads, self.encoder.hidden_size
        queries = block_rows(rows, heads, length)
        if isinstance(self.encoder, CausalEncoder):  # mlx-lm computes all queries at once
            queries = length if mx.default_device() == mx.cpu else 0
        scores = 2 * rows * heads * queries * length
        return _FLOAT_BYTES * (tokens * (14 * hidden + 6 * self.inner_size) + scores)
