"""The runner of embedding models and rerankers. A row is a job with one or more inputs; a step is one forward pass.

Each input is computed once, together with others of about the same length, also of other rows. Its result is published
at once, so a later attempt computes only the remaining inputs.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any, Final, TypeAlias

import mlx.core as mx
import numpy as np

from shared.jobs.request import Request
from shared.models.registry import ModelCard
from worker.output.format import PLAIN
from worker.runner.base import (
    InputResult,
    InvalidLogits,
    Media,
    Prompt,
    RemainingPrompt,
    Row,
    StepOutput,
    StepPlan,
)
from worker.runner.cost import UNKNOWN_COST
from worker.runner.embedding.model import EmbeddingModel
from worker.runner.embedding.passes import Item, PendingRow, next_pass
from worker.runner.memory import memory_errors
from worker.runner.weights import bytes_of

PASS_TOKENS_CPU, PASS_TOKENS_GPU = 512, 16_384
"""Tokens of a pass, padding included. A longer input has a pass of its own. More tokens make a pass longer, for which
the inputs of other jobs wait, and on a CPU no token cheaper (docs/performance.md)."""
_MIN_PASS_TOKENS: Final = 128
_MEMORY_DIVISOR: Final = 8
"""A pass takes at most an eighth of the memory that is free when the model is loaded: other models may need some."""

Vectors: TypeAlias = np.ndarray[Any, np.dtype[np.float32]]


class NoText:
    """The detokenizer of a model that generates no tokens."""

    def add(self, _token: int) -> str:
        """Return no text."""
        return ""

    def finish(self) -> str:
        """Return no text."""
        return ""


class EmbeddingRunner:
    """See `worker.runner.base.ModelRunner`.

    Args:
        max_bytes: memory for the temporary arrays of a pass.
    """

    def __init__(self, model: EmbeddingModel, card: ModelCard, max_bytes: int) -> None:
        self.card = card
        self.eos: frozenset[int] = frozenset()
        self.message_format = PLAIN
        self.weights_bytes = bytes_of(model.module)
        self.cache_bytes = max_bytes
        self.chunk = _pass_tokens(model, max_bytes)
        self.depth = 1
        self.adapter_slots = 0
        self.cost = UNKNOWN_COST
        self.about: dict[str, object] = {"device": str(mx.default_device()), "mlx": version("mlx")}
        self._model = model
        self._rows: dict[int, PendingRow] = {}  # in the order of their turns
        self._done = 0

    def tokenize(self, _request: Request) -> None:
        """Leave it to the tokenizer helper."""

    def prompt(self, tokens: Sequence[int], _shared: int, _request: Request, _images: Mapping[str, bytes]) -> Prompt:
        """Return the tokens unchanged. Jobs for this model have inputs instead of a prompt, so nothing calls this."""
        return Prompt(tuple(tokens))

    def detokenizer(self) -> NoText:
        """See `ModelRunner.detokenizer`."""
        return NoText()

    def row_bytes(self, length: int) -> int:
        """Return the bytes of a pass over one input. Rows keep nothing between passes."""
        return self._model.pass_bytes(1, length)

    def batch_bytes(self, lengths: Sequence[int]) -> int:
        """Return the bytes of the largest pass over rows whose longest inputs have these lengths."""
        longest = max(lengths, default=0)
        # Rounded up, because shorter inputs may fill a pass better.
        return self._model.pass_bytes(math.ceil(self.chunk / longest), longest) if longest else 0

    def encode_bytes(self, _media: Media | None) -> int:
        """Return 0: there are no images."""
        return 0

    def set_prefix_limit(self, max_bytes: int) -> None:
        """Do nothing: there are no prefixes."""

    def erase_prefixes(self, cutoffs: Mapping[str, float]) -> None:
        """Do nothing, as `set_prefix_limit`."""

    def insert(self, rows: Sequence[Row]) -> None:
        """See `ModelRunner.insert`."""
        self._rows |= {row.uid: PendingRow.of(row) for row in rows}

    def remove(self, uids: Iterable[int]) -> None:
        """See `ModelRunner.remove`."""
        for uid in uids:
            self._rows.pop(uid, None)

    def reset(self) -> None:
        """See `ModelRunner.reset`."""
        self._rows.clear()

    def prefillable(self) -> dict[int, RemainingPrompt]:
        """Return what the rows may take of the next pass, those first whose turn it is."""
        waiting = (row for row in self._rows.values() if row.pending)
        return {row.row.uid: RemainingPrompt(min(row.remaining, self.chunk), 0) for row in waiting}

    def next_image_s(self) -> None:
        """Return None: there are no images."""

    def execute(self, plan: StepPlan) -> StepOutput:
        """Compute one pass. The planned rows choose first; other rows fill the rest of the pass."""
        first = plan.prefill.uids if plan.prefill else ()
        chosen = [self._rows[uid] for uid in first]
        others = [row for uid, row in self._rows.items() if uid not in first]
        items = next_pass([*chosen, *others], self.chunk)
        if not items:
            return StepOutput()
        chooser = items[0].uid
        self._rows[chooser] = self._rows.pop(chooser)  # it chooses again after all others
        with memory_errors():
            computed = self._compute(items)
        return self._output(items, computed)

    def _compute(self, items: Sequence[Item]) -> Vectors:
        lengths = [len(item.input.tokens) for item in items]
        width = max(lengths)
        padded = np.zeros((len(items), width), np.int32)
        for line, item in zip(padded, items, strict=True):
            line[: len(item.input.tokens)] = item.input.tokens
        second = [item.input.second or len(item.input.tokens) for item in items]
        return np.array(self._model.compute(mx.array(padded), mx.array(lengths), mx.array(second)))

    def _output(self, items: Sequence[Item], computed: Vectors) -> StepOutput:
        """Return the results. A row with NaN or infinity in one of them fails."""
        invalid = {item.uid for item, values in zip(items, computed, strict=True) if not np.isfinite(values).all()}
        results = [
            InputResult(item.uid, item.number, self._encoded(item, values))
            for item, values in zip(items, computed, strict=True)
            if item.uid not in invalid
        ]
        for result in results:
            self._rows[result.uid].inputs.pending.discard(result.index)
        self._done += len(results)
        ended = [uid for uid in {item.uid for item in items} - invalid if not self._rows[uid].pending]
        failed = [(uid, InvalidLogits("the model's result is NaN or infinite")) for uid in sorted(invalid)]
        self.remove(invalid)
        tokens = sum(len(item.input.tokens) for item in items)
        return StepOutput(
            prefilled=dict.fromkeys(ended, 0), failed=failed, prompt_tokens=tokens, predicted_s=None, results=results
        )

    def _encoded(self, item: Item, values: Vectors) -> str:
        """Return a result as it is stored: base64 of little-endian 32-bit floats."""
        request = self._rows[item.uid].row.request
        vector = self._model.shorten(values, request.dimensions)
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()

    def warming(self) -> Iterator[None]:
        """Run a pass over short inputs and one over an input of full length; yields after each."""
        for rows, length in ((2, 16), (1, min(self.card.context, self.chunk))):
            tokens = mx.zeros((rows, length), mx.int32)
            lengths = mx.full((rows,), length, mx.int32)
            mx.eval(self._model.compute(tokens, lengths, lengths))
            yield

    def stats(self) -> dict[str, float]:
        """See `ModelRunner.stats`."""
        return {
            "memory_active_bytes": mx.get_active_memory(),
            "memory_spare_bytes": mx.get_cache_memory(),
            "memory_peak_bytes": mx.get_peak_memory(),
            "inputs_total": self._done,
        }

    def close(self) -> None:
        """Do nothing: there is nothing to write."""


def _pass_tokens(model: EmbeddingModel, max_bytes: int) -> int:
    """Return the tokens of a pass: fewer than usual if a pass would take much of the memory."""
    tokens = PASS_TOKENS_CPU if mx.default_device() == mx.cpu else PASS_TOKENS_GPU
    while tokens > _MIN_PASS_TOKENS and _MEMORY_DIVISOR * model.pass_bytes(1, tokens) > max_bytes:
        tokens //= 2
    return tokens
