"""The model runner on MLX: mlx-lm's language models, and vision models through a `VisionFamily`.

The path of a row: `insert` checks it, `PrefixFetch` waits for what disk has of its prompt, `VisionStage` encodes its
images, `Prefill` puts the rest of the prompt into a cache, `LengthBuckets` decode it beside other rows. Each step
queues the planned work and one decode step on the device, then reads the tokens of the step before.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import astuple
from importlib.metadata import version
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.utils import get_total_parameters

from shared.errors import JobFailure, PromptRefused
from shared.jobs.request import Request, Sampling
from worker.models.load import LoadedModel
from worker.runner import kv_cache, prefill_cost
from worker.runner.base import (
    IMAGE_TOKENS,
    UNKNOWN_COST,
    Detokenizer,
    Media,
    PrefillWork,
    Prompt,
    Row,
    StepOutput,
    StepPlan,
    Unread,
)
from worker.runner.decode import DecodeBatch
from worker.runner.kv_cache import Footprint
from worker.runner.length_buckets import LengthBuckets
from worker.runner.logits.logprobs import MOST_ALTERNATIVES
from worker.runner.logits.penalties import Penalties
from worker.runner.logits.processor import LogitsProcessor
from worker.runner.memory import UNLIMITED, Memory, memory_errors
from worker.runner.prefill import Prefill
from worker.runner.prefix.cache import PrefixCache
from worker.runner.prefix.fetch import PrefixFetch
from worker.runner.prefix.spill import Spill
from worker.runner.speculation.ngram import NgramProposer
from worker.runner.speculation.verification import Speculation
from worker.runner.speculation.warming import measuring as measuring_passes
from worker.runner.vision.family import VisionFamily
from worker.runner.vision.stage import Encoded, VisionStage

CHUNK_CPU = 32
"""Prompt tokens of a chunk on a CPU. A token costs a sixth more than in chunks of 64 or more, but decoding rows
wait half as long."""
CHUNK_GPU = 512
"""A GPU is only busy with some hundreds of tokens at a time."""
PADDING_PRICE_CPU = 4
"""On a CPU, attending to a byte of the cache takes 3 to 5 times as long as multiplying by a byte of the weights."""
SHARE_OF_PADDING = 32
"""Divisor: the padding of a length bucket may take 1/32 of the memory for caches, however large the model is."""

SHARE_OF_FEATURES = 16
"""Divisor: encoded images may take 1/16 of the memory that rows leave."""
MOST_FEATURES = 2**30
"""Maximum bytes of encoded images: about a hundred screenshots of a large model."""

CLOSE_S = 1.0
"""Time limit for writing prefixes at the end; the rest is lost."""
IDLE_WAIT_S = 0.02
"""Longest wait of an idle step for the disk or for pixels."""
_CLEAR_EVERY = 512
"""Steps between two calls that free MLX's spare buffers: their sizes fit a changed batch less and less."""


class TextDetokenizer:
    """mlx-lm's streaming detokenizer, for one sequence."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def add(self, token: int) -> str:
        """See `Detokenizer.add`."""
        self._inner.add_token(token)
        return str(self._inner.last_segment)

    def finish(self) -> str:
        """See `Detokenizer.finish`."""
        self._inner.finalize()
        return str(self._inner.last_segment)


class MLXRunner:
    """See `worker.runner.base.ModelRunner`.

    Args:
        chunk: most tokens of a long prompt's chunk.
        memory: for the caches of rows and prefixes.
        spill: the disk for prefixes.
        family: what is particular to a vision model; None for a language model.
        processors: of logits, beside penalties.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        chunk: int,
        memory: Memory = UNLIMITED,
        spill: Spill | None = None,
        family: VisionFamily | None = None,
        *,
        speculation_tokens: int = 0,
        processors: Sequence[LogitsProcessor] = (),
    ) -> None:
        self.card = loaded.card
        self.eos = loaded.eos
        self.chunk = chunk
        self.depth = max(len(kv_cache.empty_row(loaded.model)) - 1, 1)  # the last layer's output is not needed
        self.cost = UNKNOWN_COST
        self.cache_bytes = memory.most_bytes
        self.about = _about(loaded, family)
        self.weights_bytes = _weights_bytes(loaded) + (family.encoder.nbytes if family else 0)
        self._model = loaded.model
        self._tokenizer = loaded.tokenizer
        self._vocabulary = _vocabulary(loaded)
        self._processors = (Penalties(), *processors)
        self._vision = VisionStage(family, 0) if family else None
        self._footprint = Footprint.of(self._model)
        self._prefixes = PrefixCache(self._model, memory.prefix_bytes, spill)
        self._fetch = PrefixFetch(self._prefixes)
        self._prefill = Prefill(self._model, chunk, self._prefixes, self.cost)
        self._speculation = Speculation(self._model, speculation_tokens, NgramProposer())
        self._batches = LengthBuckets(self._new_batch, self._footprint, _most_padding(loaded, memory))
        # A row is reported as prefilled with its first token: before that its prompt is only queued.
        self._joined: dict[int, int] = {}
        self._refused: dict[int, Exception] = {}
        self._steps = 0
        self.set_prefix_limit(memory.most_bytes)

    def tokenize(self, request: Request) -> list[int] | None:  # noqa: ARG002
        """The tokenizing helper does that."""
        return None

    def prompt(self, tokens: Sequence[int], shared: int, request: Request, images: Mapping[str, bytes]) -> Prompt:
        """See `ModelRunner.prompt`."""
        if self._vision is not None:
            placed, media = self._vision.place(tokens, request, images)
        elif images:
            raise PromptRefused(JobFailure.TEMPLATE, "This model takes no images.")
        else:
            placed, media = list(tokens), None
        if not placed:
            raise PromptRefused(JobFailure.TEMPLATE, "The prompt is empty: it has no tokens.")
        if len(placed) + 1 > self.card.context:
            detail = f"The prompt has {len(placed)} tokens; the model takes {self.card.context} with the answer."
            raise PromptRefused(JobFailure.CONTEXT_LENGTH, detail)
        if fault := self._unknown_token(placed, images=media is not None):
            raise PromptRefused(JobFailure.TEMPLATE, fault)
        return Prompt(tuple(placed), shared, media)

    def detokenizer(self) -> Detokenizer:
        """See `ModelRunner.detokenizer`. A space that begins the text stays for vision models, as in mlx-vlm."""
        inner = self._tokenizer.detokenizer
        if self._vision is not None and hasattr(inner, "_maybe_trim_space"):
            inner._maybe_trim_space = str  # noqa: SLF001 - there is no option for it
        return TextDetokenizer(inner)

    def row_bytes(self, length: int) -> int:
        """See `ModelRunner.row_bytes`."""
        return self._footprint.allocated(length)

    def batch_bytes(self, lengths: Sequence[int]) -> int:
        """See `ModelRunner.batch_bytes`."""
        return self._batches.bytes(lengths)

    def encode_bytes(self, media: Media | None) -> int:
        """See `ModelRunner.encode_bytes`."""
        return self._vision.bytes(media) if self._vision else 0

    def set_prefix_limit(self, most_bytes: int) -> None:
        """See `ModelRunner.set_prefix_limit`."""
        if self._vision is not None:
            features = min(most_bytes // SHARE_OF_FEATURES, MOST_FEATURES)
            self._vision.allow(features)
            most_bytes -= features
        self._prefixes.allow(most_bytes)

    def insert(self, rows: Sequence[Row]) -> None:
        """Add rows. One that the model cannot take fails with the next step, alone."""
        for row in rows:
            if fault := self._fault(row):
                self._refused[row.uid] = ValueError(fault)
            elif not self._fetch.add(row):
                self._fetched(row)

    def remove(self, uids: Iterable[int]) -> None:
        """See `ModelRunner.remove`."""
        gone = frozenset(uids)
        self._fetch.remove(gone)
        if self._vision is not None:
            self._vision.remove(gone)
        self._prefill.remove(gone)
        self._batches.remove(gone)
        self._joined = {uid: reused for uid, reused in self._joined.items() if uid not in gone}
        self._refused = {uid: error for uid, error in self._refused.items() if uid not in gone}

    def reset(self) -> None:
        """See `ModelRunner.reset`."""
        self._prefixes.clear()
        self._fetch.clear()
        if self._vision is not None:
            self._vision.clear()
        self._prefill = Prefill(self._model, self.chunk, self._prefixes, self.cost)
        self._batches.clear()
        self._joined.clear()
        self._refused.clear()

    def prefillable(self) -> Mapping[int, Unread]:
        """See `ModelRunner.prefillable`."""
        for row in self._fetch.ready():
            self._fetched(row)
        for row in self._vision.ready() if self._vision else ():
            self._prefill.add(row)
        return self._prefill.unread()

    def images_waiting(self) -> float | None:
        """See `ModelRunner.images_waiting`."""
        return self._vision.waiting_s() if self._vision else None

    def execute(self, plan: StepPlan) -> StepOutput:
        """See `ModelRunner.execute`."""
        if not (plan.prefill or plan.encode or len(self._batches)):
            self._wait()
        with memory_errors():
            encoded = self._vision.advance(plan.encode) if self._vision else Encoded()
            prefilled = self._prefill.advance(plan.prefill, decoding=len(self._batches) > 0)
            if prefilled.rows:
                self._batches.join(prefilled.rows, prefilled.cache)
            drafted = self._speculation.drafted
            tokens = self._batches.step(speculate=plan.speculate)
        self._steps += 1
        if self._steps % _CLEAR_EVERY == 0:
            mx.clear_cache()
        reported, self._joined = (
            self._joined,
            {row.uid: reused for row, reused in zip(prefilled.rows, prefilled.reused, strict=True)},
        )
        return StepOutput(
            tokens=tokens,
            prefilled=reported,
            failed=self._take_failures(encoded),
            out_of_memory=prefilled.out_of_memory,
            prompt_tokens=prefilled.tokens,
            predicted_s=None if prefilled.predicted_s is None else prefilled.predicted_s + encoded.predicted_s,
            verified=self._speculation.drafted > drafted,
        )

    def stats(self) -> dict[str, float]:
        """Memory in bytes, also what MLX keeps for later and its peak; buckets; prefixes, drafts, images."""
        return {
            "memory_active_bytes": mx.get_active_memory(),
            "memory_spare_bytes": mx.get_cache_memory(),
            "memory_peak_bytes": mx.get_peak_memory(),
            "kv_bytes": self._prefill.nbytes + self._batches.nbytes,
            "length_buckets": len(self._batches.lengths),
            **self._prefixes.stats(),
            **self._speculation.stats(),
            **(self._vision.stats() if self._vision else {}),
        }

    def close(self) -> None:
        """See `ModelRunner.close`."""
        if self._vision is not None:
            self._vision.close()
        self._prefixes.close(CLOSE_S)

    def warm(self) -> None:
        """Run a chunk and a few steps, so that the first job finds every kernel compiled."""
        for _ in self.warming():
            pass

    def warming(self) -> Iterator[None]:
        """The same in pieces."""
        if self._vision is not None:
            yield from self._vision.warming()
        yield from self._warm_steps()
        if self.row_bytes(prefill_cost.BEHIND + self.chunk) <= self.cache_bytes:
            self.cost = yield from prefill_cost.measuring(self._model, self.chunk)
        yield from self._warm_passes()
        self.reset()

    def _warm_steps(self) -> Iterator[None]:
        """Two rows of different sampling, chunk by chunk, alone and together."""
        prompt = (0,) * (self.chunk + 1)
        requests = [Request("", 3, Sampling(temperature=float(i), top_p=0.9)) for i in range(2)]
        self.insert([Row(-1 - i, request, prompt, 0, 3) for i, request in enumerate(requests)])
        while (unread := self.prefillable()) or len(self._batches):
            self.execute(StepPlan(prefill=PrefillWork(tuple(unread)) if unread else None))
            yield

    def _warm_passes(self) -> Generator[None, None, None]:
        if self._speculation.able:
            batch = self._new_batch()
            self._speculation.cost = yield from measuring_passes(self._model, self._speculation, batch, self.cost)

    def _wait(self) -> None:
        """Wait a moment for what keeps rows from being prefilled."""
        waits: list[Future[Any] | None] = [self._fetch.next_read()]
        if self._vision is not None:
            waits.append(self._vision.next_pixels())
        if pending := [each for each in waits if each is not None]:
            wait(pending, IDLE_WAIT_S, return_when="FIRST_COMPLETED")

    def _fetched(self, row: Row) -> None:
        """Go on with a row that has what disk had of its prompt."""
        cached = self._prefixes.length(row.owner, row.prompt[:-1]) if row.media is not None else 0
        if self._vision is None or not self._vision.add(row, cached):
            self._prefill.add(row)

    def _take_failures(self, encoded: Encoded) -> list[tuple[int, Exception]]:
        refused, self._refused = self._refused, {}
        unread = [(row.uid, error) for row, error in encoded.failed]
        return [*refused.items(), *unread, *self._batches.take_failures()]

    def _new_batch(self) -> DecodeBatch:
        return DecodeBatch(self._model, self._prefixes, self._speculation, self._processors)

    def _fault(self, row: Row) -> str | None:
        """Why a row cannot go into a batch. What would raise, or read outside an array, must not get that far."""
        if not row.prompt or row.max_new_tokens < 1:
            return "the row has no prompt or nothing to generate"
        if not all(map(math.isfinite, astuple(row.sampling))):
            return "a sampling value is not a finite number"
        if row.request.logprobs is not None and not 0 <= row.request.logprobs <= MOST_ALTERNATIVES:
            return f"log-probabilities of 0 to {MOST_ALTERNATIVES} alternatives can be computed"
        return self._unknown_token(row.prompt, images=row.media is not None)

    def _unknown_token(self, tokens: Sequence[int], *, images: bool) -> str | None:
        text = [token for token in tokens if token < IMAGE_TOKENS] if images else tokens
        if text and (min(text) < 0 or max(text) >= self._vocabulary):
            return f"The prompt has a token that the model does not know: it has {self._vocabulary} tokens."
        return None


def default_chunk() -> int:
    """Prompt tokens per chunk that suit the device."""
    return CHUNK_CPU if mx.default_device() == mx.cpu else CHUNK_GPU


def padding_worth_a_pass(loaded: LoadedModel) -> int:
    """Bytes of padding to which a step attends in the time in which it reads all weights once."""
    price = PADDING_PRICE_CPU if mx.default_device() == mx.cpu else 1
    return _weights_bytes(loaded) // price


def _most_padding(loaded: LoadedModel, memory: Memory) -> int:
    return min(padding_worth_a_pass(loaded), memory.most_bytes // SHARE_OF_PADDING)


def _vocabulary(loaded: LoadedModel) -> int:
    """How many tokens the embedding has."""
    config = loaded.config
    return int(config.get("vocab_size") or config.get("text_config", {}).get("vocab_size") or len(loaded.tokenizer))


def _parameters(loaded: LoadedModel) -> list[mx.array]:
    return list(dict(tree_flatten(loaded.model.parameters())).values())


def _weights_bytes(loaded: LoadedModel) -> int:
    return sum(array.nbytes for array in _parameters(loaded))


def _about(loaded: LoadedModel, family: VisionFamily | None) -> dict[str, object]:
    types = {str(array.dtype).removeprefix("mlx.core.") for array in _parameters(loaded)}
    quantisation = loaded.config.get("quantization") or {}
    about: dict[str, object] = {
        "device": str(mx.default_device()),
        "dtype": "/".join(sorted(types)),
        "quantisation_bits": quantisation.get("bits"),
        "parameters": get_total_parameters(loaded.model),  # type: ignore[no-untyped-call]
        "mlx": version("mlx"),
        "mlx_lm": version("mlx-lm"),
    }
    if family is not None:
        about |= {"mlx_vlm": version("mlx-vlm"), "encoder_parameters": family.encoder.parameters}
    return about
