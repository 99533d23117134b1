"""The model runner on MLX: mlx-lm's language models, and vision models through a `VisionHalf`.

A row passes through these stages: `insert` checks it, `AdapterSlots` loads its adapter, `PrefixFetch` reads its prefix
from disk, `VisionStage` encodes its images, `Prefill` computes the cache of the rest of its prompt, and `LengthBuckets`
decodes it together with other rows. Each step queues the planned work and one decode step on the device, then reads the
tokens of the previous step.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import astuple, replace
from typing import Any

import mlx.core as mx

from shared.errors import JobFailure, PromptRefused
from shared.jobs.request import Request, Sampling
from worker.models.load import LoadedModel
from worker.runner import kv_cache, prefill_cost, weights
from worker.runner.adapters.slots import AdapterSlots
from worker.runner.base import (
    IMAGE_TOKENS,
    Detokenizer,
    Media,
    PrefillWork,
    Prompt,
    RemainingPrompt,
    Row,
    StepOutput,
    StepPlan,
)
from worker.runner.batching.support import UNRESTRICTED, BatchingSupport, Together
from worker.runner.cost import UNKNOWN_COST
from worker.runner.decode import DecodeBatch
from worker.runner.detokenizer import make_detokenizer
from worker.runner.kv_cache import Footprint
from worker.runner.length_buckets import LengthBuckets
from worker.runner.logits.bias import LogitBias
from worker.runner.logits.constraint import ConstraintCompiler
from worker.runner.logits.logprobs import MAX_ALTERNATIVES
from worker.runner.logits.penalties import Penalties
from worker.runner.logits.processor import LogitsProcessor
from worker.runner.memory import UNLIMITED, Memory, memory_errors
from worker.runner.prefill import Prefill
from worker.runner.prefix.cache import PrefixCache
from worker.runner.prefix.fetch import PrefixFetch
from worker.runner.prefix.spill import Spill
from worker.runner.speculation.draft_model import DraftModelProposer
from worker.runner.speculation.ngram import NgramProposer
from worker.runner.speculation.verification import MAX_ROWS, Speculation
from worker.runner.speculation.warming import measure_draft, measure_passes
from worker.runner.vision.half import VisionHalf
from worker.runner.vision.stage import Encoded, VisionStage

CHUNK_CPU = 32
"""Prompt tokens per chunk on a CPU. A token costs a sixth more than in chunks of 64 or more, but decoding rows wait
half as long."""
CHUNK_GPU = 512
"""Prompt tokens per chunk on a GPU, which needs several hundred tokens to be fully used."""

FEATURES_DIVISOR = 16
"""Encoded images may take 1/16 of the memory that rows do not need."""
MAX_FEATURE_BYTES = 2**30
"""Maximum bytes of encoded images: about a hundred screenshots of a large model."""

CLOSE_S = 1.0
"""Time limit for writing prefixes on shutdown. The rest is lost."""
IDLE_WAIT_S = 0.02
"""Maximum wait of an idle step for the disk or for decoded images."""
_CLEAR_EVERY = 512
"""Steps between two calls that free MLX's unused buffers: after the batch has changed, their sizes rarely fit."""


class MLXRunner:
    """See `worker.runner.base.ModelRunner`.

    Args:
        chunk: maximum tokens per chunk of a long prompt.
        memory: limits for the caches of rows and prefixes.
        spill: the disk store for prefixes; None: prefixes stay in memory.
        vision: the image half of the model; None for a language model.
        batching: how far rows may share passes.
        speculation_tokens: maximum draft tokens per row and step; 0: no speculation.
        processors: logits processors in addition to the penalties and the logit bias.
        draft: a small model with the same tokenizer that drafts tokens for this one.
        adapters: the adapters that rows can use; None: there are none.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        chunk: int,
        memory: Memory = UNLIMITED,
        spill: Spill | None = None,
        vision: VisionHalf | None = None,
        *,
        batching: BatchingSupport = UNRESTRICTED,
        speculation_tokens: int = 0,
        processors: Sequence[LogitsProcessor] = (),
        draft: LoadedModel | None = None,
        adapters: AdapterSlots | None = None,
    ) -> None:
        self.eos = loaded.eos
        self.message_format = loaded.message_format
        self.chunk = chunk
        self.depth = max(len(kv_cache.empty_row(loaded.model)) - 1, 1)  # the last layer's output is not needed
        self.cost = UNKNOWN_COST
        self.cache_bytes = memory.max_bytes
        self.about = weights.about(loaded, vision) | {"batching": batching.to_dict()}
        self.weights_bytes = weights.weights_bytes(loaded) + (weights.bytes_of(vision.encoder.tower) if vision else 0)
        self.weights_bytes += weights.weights_bytes(draft) if draft else 0
        self._adapters = adapters or AdapterSlots.empty()
        self.adapter_slots = self._adapters.slots
        self.weights_bytes += self._adapters.nbytes
        self._model = loaded.model
        self._tokenizer = loaded.tokenizer
        self._vocabulary = loaded.card.vocabulary or len(loaded.tokenizer)
        self._processors: tuple[LogitsProcessor, ...] = (Penalties(), LogitBias(), *processors)
        self._constraints = ConstraintCompiler(loaded.tokenizer, loaded.message_format, self._vocabulary, self.eos)
        announced = self._adapters.announced
        self.card = replace(loaded.card, structured=self._constraints.supported, adapters=announced)
        self._vision = VisionStage(vision, 0) if vision else None
        self._footprint = Footprint.of(self._model)
        self._batching = batching
        self._prefixes = PrefixCache(self._model, memory.prefix_bytes if batching.continues else 0, spill)
        self._fetch = PrefixFetch(self._prefixes)
        self._prefill = self._new_prefill()
        draft_tokens = speculation_tokens if batching.speculates else 0
        max_rows = MAX_ROWS if batching.prefill is Together.ANY else 1
        self._draft = DraftModelProposer(draft.model, self._vocabulary) if draft and draft_tokens else None
        proposers = [NgramProposer(), *([self._draft] if self._draft else [])]
        self._speculation = Speculation(self._model, draft_tokens, proposers, max_rows)
        self._batches = LengthBuckets(
            self._new_batch, self._footprint, weights.max_padding_bytes(loaded, memory), batching
        )
        # A row is reported as prefilled together with its first token: until then its prompt is only queued.
        self._joined: dict[int, int] = {}
        self._rejected: dict[int, Exception] = {}
        self._steps = 0
        self.set_prefix_limit(memory.max_bytes)

    def tokenize(self, request: Request) -> list[int] | None:  # noqa: ARG002
        """Return None: a separate tokenizer process does this."""
        return None

    def prompt(self, tokens: Sequence[int], shared: int, request: Request, images: Mapping[str, bytes]) -> Prompt:
        """See `ModelRunner.prompt`."""
        if self._vision is not None:
            expanded, media = self._vision.expand(tokens, request, images)
        elif images:
            raise PromptRefused(JobFailure.TEMPLATE, "This model does not accept images.")
        else:
            expanded, media = list(tokens), None
        if not expanded:
            raise PromptRefused(JobFailure.TEMPLATE, "The prompt is empty: it has no tokens.")
        if len(expanded) + 1 > self.card.context:
            detail = (
                f"The prompt has {len(expanded)} tokens, which leaves no room for an answer in the model's context of "
                f"{self.card.context} tokens."
            )
            if parts := len(request.image_parts):
                of_images = sum(token >= IMAGE_TOKENS for token in expanded)
                detail += f" {of_images} of them are of {parts} image{'s' * (parts > 1)}: send fewer or smaller ones."
            raise PromptRefused(JobFailure.CONTEXT_LENGTH, detail)
        if problem := self._unknown_token(expanded, images=media is not None):
            raise PromptRefused(JobFailure.TEMPLATE, problem)
        return Prompt(tuple(expanded), shared, media, self._constraints.compile(request))

    def detokenizer(self) -> Detokenizer:
        """See `ModelRunner.detokenizer`."""
        return make_detokenizer(self._tokenizer)

    def row_bytes(self, length: int) -> int:
        """See `ModelRunner.row_bytes`."""
        return self._footprint.allocated(length) + self._draft_bytes([length])

    def batch_bytes(self, lengths: Sequence[int]) -> int:
        """See `ModelRunner.batch_bytes`."""
        return self._batches.bytes(lengths) + self._draft_bytes(lengths)

    def encode_bytes(self, media: Media | None) -> int:
        """See `ModelRunner.encode_bytes`."""
        return self._vision.bytes(media) if self._vision else 0

    def set_prefix_limit(self, max_bytes: int) -> None:
        """See `ModelRunner.set_prefix_limit`."""
        if self._vision is not None:
            feature_bytes = min(max_bytes // FEATURES_DIVISOR, MAX_FEATURE_BYTES)
            self._vision.set_cache_limit(feature_bytes)
            max_bytes -= feature_bytes
        self._prefixes.set_limit(max_bytes)

    def erase_prefixes(self, cutoffs: Mapping[str, float]) -> None:
        """See `ModelRunner.erase_prefixes`."""
        self._prefixes.erase(cutoffs)
        if self._vision is not None:
            self._vision.erase_features(cutoffs)

    def insert(self, rows: Sequence[Row]) -> None:
        """Add rows. A row that the model cannot process is reported as failed by the next step."""
        for row in rows:
            if problem := self._problem(row):
                self._rejected[row.uid] = ValueError(problem)
            elif (placed := self._adapters.enter(row)) is not None:
                self._fetch_or_encode(placed)

    def remove(self, uids: Iterable[int]) -> None:
        """See `ModelRunner.remove`."""
        removed = frozenset(uids)
        self._adapters.remove(removed)
        self._fetch.remove(removed)
        if self._vision is not None:
            self._vision.remove(removed)
        self._prefill.remove(removed)
        self._batches.remove(removed)
        for uid in removed:
            self._joined.pop(uid, None)
            self._rejected.pop(uid, None)

    def reset(self) -> None:
        """See `ModelRunner.reset`."""
        self._adapters.clear()
        self._prefixes.clear()
        self._fetch.clear()
        if self._vision is not None:
            self._vision.clear()
        self._prefill = self._new_prefill()
        self._batches.clear()
        self._joined.clear()
        self._rejected.clear()

    def prefillable(self) -> Mapping[int, RemainingPrompt]:
        """See `ModelRunner.prefillable`."""
        for row in self._adapters.ready():
            self._fetch_or_encode(row)
        for row in self._fetch.ready():
            self._encode_or_prefill(row)
        for row in self._vision.ready() if self._vision else ():
            self._prefill.add(row)
        return self._prefill.remaining()

    def next_image_s(self) -> float | None:
        """See `ModelRunner.next_image_s`."""
        return self._vision.next_image_s() if self._vision else None

    def execute(self, plan: StepPlan) -> StepOutput:
        """See `ModelRunner.execute`."""
        if not (plan.prefill or plan.encode or len(self._batches)):
            self._wait()
        with memory_errors():
            self._adapters.advance()
            encoded = self._vision.advance(plan.encode) if self._vision else Encoded()
            prefilled = self._prefill.advance(plan.prefill, decoding=len(self._batches) > 0)
            if prefilled.rows:
                self._batches.join(prefilled.rows, prefilled.cache)
            drafted = self._speculation.drafted
            tokens = self._batches.step(speculate=plan.speculate, ahead=plan.ahead)
        self._steps += 1
        if self._steps % _CLEAR_EVERY == 0:
            mx.clear_cache()
        joined = {row.uid: reused for row, reused in zip(prefilled.rows, prefilled.reused, strict=True)}
        reported, self._joined = (self._joined, joined) if plan.ahead else (self._joined | joined, {})
        self._adapters.remove(prefilled.out_of_memory)
        return StepOutput(
            tokens=tokens,
            prefilled=reported,
            failed=self._take_failures(encoded),
            out_of_memory=prefilled.out_of_memory,
            prompt_tokens=prefilled.tokens,
            predicted_s=_sum(prefilled.predicted_s, encoded.predicted_s),
            verified=self._speculation.drafted > drafted,
        )

    def stats(self) -> dict[str, float]:
        """See `ModelRunner.stats`. Covers memory, caches, buckets, prefixes, speculation, adapters and images."""
        return {
            "memory_active_bytes": mx.get_active_memory(),
            "memory_spare_bytes": mx.get_cache_memory(),
            "memory_peak_bytes": mx.get_peak_memory(),
            "kv_bytes": self._prefill.nbytes + self._batches.nbytes,
            "length_buckets": len(self._batches.lengths),
            **self._prefixes.stats(),
            **self._speculation.stats(),
            **(self._adapters.stats() if self.adapter_slots else {}),
            **(self._vision.stats() if self._vision else {}),
        }

    def close(self) -> None:
        """See `ModelRunner.close`."""
        self._adapters.close()
        if self._vision is not None:
            self._vision.close()
        self._prefixes.close(CLOSE_S)

    def warm(self) -> None:
        """Run a chunk and a few steps to compile every kernel, and measure the cost of passes."""
        for _ in self.warming():
            pass

    def warming(self) -> Generator[None, None, None]:
        """Do the same as `warm`; yields after each short step."""
        if self._vision is not None:
            yield from self._vision.warming()
        yield from self._warm_steps()
        if self.row_bytes(prefill_cost.CONTEXT_TOKENS + self.chunk) <= self.cache_bytes:
            self.cost = yield from prefill_cost.measure(self._model, self.chunk)
            self._prefixes.disk.token_s = self.cost.token
        yield from self._warm_passes()
        self.reset()

    def _warm_steps(self) -> Iterator[None]:
        """Run two rows with different sampling through chunked prefill and decoding."""
        prompt = (0,) * (self.chunk + 1)
        requests = [Request("", 3, Sampling(temperature=float(i), top_p=0.9)) for i in range(2)]
        self.insert([Row(-1 - i, request, prompt, 0, 3) for i, request in enumerate(requests)])
        while (remaining := self.prefillable()) or len(self._batches):
            self.execute(StepPlan(prefill=PrefillWork(tuple(remaining)) if remaining else None))
            yield

    def _warm_passes(self) -> Generator[None, None, None]:
        if self._speculation.supported:
            batch = self._new_batch()
            self._speculation.cost = yield from measure_passes(self._model, self._speculation, batch, self.cost)
            if self._draft is not None:
                yield from measure_draft(self._draft)

    def _wait(self) -> None:
        """Wait up to `IDLE_WAIT_S` for the disk read or the image file that holds back the next row."""
        futures: list[Future[Any] | None] = [self._fetch.next_read(), self._adapters.next_read()]
        if self._vision is not None:
            futures.append(self._vision.next_pixels())
        if pending := [future for future in futures if future is not None]:
            wait(pending, IDLE_WAIT_S, return_when="FIRST_COMPLETED")

    def _fetch_or_encode(self, row: Row) -> None:
        """Pass a row to its next stage after its adapter was loaded."""
        if not self._fetch.add(row):
            self._encode_or_prefill(row)

    def _encode_or_prefill(self, row: Row) -> None:
        """Pass a row to its next stage after its prefix was read from disk."""
        cached = self._prefixes.length(row.owner, row.prompt[:-1]) if row.media is not None else 0
        if self._vision is None or not self._vision.add(row, cached):
            self._prefill.add(row)

    def _draft_bytes(self, lengths: Sequence[int]) -> int:
        """Return the bytes of the draft model's caches. At most `MAX_ROWS` rows have one."""
        if self._draft is None:
            return 0
        return sum(self._draft.footprint.allocated(length) for length in sorted(lengths)[-MAX_ROWS:])

    def _take_failures(self, encoded: Encoded) -> list[tuple[int, Exception]]:
        rejected, self._rejected = self._rejected, {}
        not_encoded = [(row.uid, error) for row, error in encoded.failed]
        failures = [*rejected.items(), *not_encoded, *self._batches.take_failures(), *self._adapters.take_failures()]
        self._adapters.remove([uid for uid, _ in failures])
        return failures

    def _new_prefill(self) -> Prefill:
        model, form = self._model, self.message_format
        return Prefill(model, self.chunk, self._prefixes, self.cost, self._batching, self.eos, form)

    def _new_batch(self) -> DecodeBatch:
        return DecodeBatch(self._model, self._prefixes, self._speculation, self._processors)

    def _problem(self, row: Row) -> str | None:
        """Return why a row cannot be processed. Such a row would raise in the batch, or read outside of an array."""
        if not row.prompt or row.max_new_tokens < 1:
            return "the row has an empty prompt or no tokens to generate"
        if not all(map(math.isfinite, astuple(row.sampling))):
            return "a sampling option is not a finite number"
        if row.request.logprobs is not None and not 0 <= row.request.logprobs <= MAX_ALTERNATIVES:
            return f"the number of log-probability alternatives is not between 0 and {MAX_ALTERNATIVES}"
        if not all(0 <= token < self._vocabulary for token, _ in row.request.logit_bias):
            return f"a token id of the logit bias is not below {self._vocabulary}"
        return self._unknown_token(row.prompt, images=row.media is not None)

    def _unknown_token(self, tokens: Sequence[int], *, images: bool) -> str | None:
        text = [token for token in tokens if token < IMAGE_TOKENS] if images else tokens
        if text and (min(text) < 0 or max(text) >= self._vocabulary):
            token = next(token for token in text if not 0 <= token < self._vocabulary)
            return f"The prompt contains the token id {token}, but the model has {self._vocabulary} tokens."
        return None


def _sum(first_s: float | None, second_s: float | None) -> float | None:
    """Return the sum of two durations; None if one is unknown."""
    return None if first_s is None or second_s is None else first_s + second_s


def default_chunk() -> int:
    """Return the default number of prompt tokens per chunk for the device."""
    return CHUNK_CPU if mx.default_device() == mx.cpu else CHUNK_GPU
