"""Makes the prompt of a claimed job, and reads what its earlier attempts wrote."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from redis import RedisError

from shared.errors import Gone, JobFailure, PromptRefused
from shared.jobs.inputs import Input, unpack_inputs
from shared.jobs.log import JobLog, Written
from shared.jobs.request import GENERATE, Request
from shared.models.capabilities import adapter_problem, missing_capability, unusable_option, wrong_kind
from shared.models.registry import ModelCard
from shared.queue.claims import ClaimedJob
from shared.redis.client import passes
from shared.tokenizing.client import TokenizerBusy, TokenizerError, Tokenizing
from shared.tokenizing.inputs import refusal
from shared.tokenizing.messages import Tokenized, TokenizerSource
from worker.runner.base import ModelRunner, Prompt, RowInputs

T = TypeVar("T")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A job that can be submitted to its model's engine.

    Attributes:
        written: the output of earlier attempts; None at the first attempt.
        new_tokens: the prompt's token ids, unless they were stored with the job. They are stored for later attempts.
    """

    prompt: Prompt
    written: Written | None
    new_tokens: tuple[int, ...] | None = None


class TryLater(Exception):
    """The job cannot be prepared now because Redis or the tokenizer is unavailable. Release it."""


class Preparer:
    """Prepares the claimed jobs of one model. Safe to use from several threads.

    Args:
        sources: returns the sources of the model's tokenizer, best first.
        images: returns a job's images by digest, as far as they are still stored.
    """

    def __init__(
        self,
        tokenizing: Tokenizing,
        sources: Callable[[], Sequence[TokenizerSource]],
        images: Callable[[str, Collection[str]], Mapping[str, bytes]],
        log: JobLog,
    ) -> None:
        self._tokenizing = tokenizing
        self._sources = sources
        self._images = images
        self._log = log

    def prepare(self, claimed: ClaimedJob, runner: ModelRunner) -> Prepared:
        """Return a job's prompt and the output of its earlier attempts.

        Raises:
            PromptRefused: the job fails with this code and message.
            TryLater: release the job.
            Exception: the job fails for a reason that its request did not cause.
        """
        job = claimed.job
        try:
            _check_kind(claimed.request, runner.card)
            if claimed.request.kind != GENERATE:
                return self._prepare_inputs(claimed, runner.card)
            _check_capabilities(claimed.request, runner.card)
            written = self._log.written(job.id, job.last_event) if job.attempt > 1 else None
            tokenized = self._tokenized(claimed, runner)
            self._tokenizing.check_constraints(claimed.request)
            images = self._images_of(job.id, claimed.request)
            prompt = runner.prompt(tokenized.tokens, tokenized.shared, claimed.request, images)
            return Prepared(prompt, written, tokenized.tokens if claimed.tokens is None else None)
        except Gone as error:
            logger.error("job_log_lost", extra={"reason": str(error)})
            message = "The job cannot continue because a part of its log was lost."
            raise PromptRefused(JobFailure.LOG_LOST, message) from error
        except TokenizerBusy as error:
            raise TryLater(str(error)) from error
        except RedisError as error:
            if not passes(error):
                raise
            raise TryLater(str(error)) from error

    def _prepare_inputs(self, claimed: ClaimedJob, card: ModelCard) -> Prepared:
        """Prepare an embedding or rerank job."""
        job = claimed.job
        written = self._log.written(job.id, job.last_event) if job.attempt > 1 else None
        packed = claimed.tokens or self._tokenize_inputs(claimed.request, card)
        inputs = unpack_inputs(packed)
        _check_inputs(inputs, claimed.request, card)
        longest = max((each.tokens for each in inputs), key=len)
        prompt = Prompt(longest, inputs=RowInputs(inputs, set(range(len(inputs)))))
        return Prepared(prompt, written, packed if claimed.tokens is None else None)

    def _tokenize_inputs(self, request: Request, card: ModelCard) -> tuple[int, ...]:
        """Tokenise inputs in a helper, with the first source that works."""
        return self._from_sources(lambda source: self._tokenizing.tokenize_inputs(source, request, card))

    def _tokenized(self, claimed: ClaimedJob, runner: ModelRunner) -> Tokenized:
        """Return the prompt's token ids: stored with the job, from the runner, or from a tokenizer helper."""
        if claimed.tokens is not None:
            _check_vocabulary(claimed.tokens, runner.card)
            return Tokenized(claimed.tokens, claimed.shared)
        tokens = runner.tokenize(claimed.request)
        return Tokenized(tuple(tokens)) if tokens is not None else self._tokenize(claimed.request, runner.card)

    def _tokenize(self, request: Request, card: ModelCard) -> Tokenized:
        """Tokenise a prompt in a helper, with the first source that works."""

        def tokenize(source: TokenizerSource) -> Tokenized:
            return self._tokenizing.tokenize(source, request, context=card.context, vocabulary=card.vocabulary)

        return self._from_sources(tokenize)

    def _from_sources(self, work: Callable[[TokenizerSource], T]) -> T:
        for source in self._sources():
            try:
                return work(source)
            except TokenizerBusy:
                raise
            except TokenizerError as error:
                logger.warning("tokenizer_unusable", extra={"path": source.path, "reason": str(error)})
        raise TokenizerError("no source of the model's tokenizer can be used")

    def _images_of(self, job_id: str, request: Request) -> Mapping[str, bytes]:
        """Return the images that a request's messages refer to.

        Raises:
            PromptRefused: at least one of them is no longer stored.
        """
        digests = {part["image"] for part in request.image_parts}
        images = self._images(job_id, digests) if digests else {}
        if len(images) < len(digests):
            raise PromptRefused(
                JobFailure.IMAGE_LOST, "An image of this job is no longer stored. Send the request again."
            )
        return images


def _check_vocabulary(tokens: Sequence[int], card: ModelCard) -> None:
    """Refuse token ids that the embedding does not have; reading beyond it would crash the process.

    The API could not check token ids that the caller sent before it knew the model.
    """
    if card.vocabulary is not None and max(tokens) >= card.vocabulary:
        message = f"The prompt contains the token id {max(tokens)}; the model's ids are 0 to {card.vocabulary - 1}."
        raise PromptRefused(JobFailure.TEMPLATE, message)


def _check_kind(request: Request, card: ModelCard) -> None:
    """Refuse a request for a model of another kind, which was accepted before the model's kind was known."""
    if reason := wrong_kind(request, card.id, card.kind):
        raise PromptRefused(JobFailure.TEMPLATE, reason, "model")


def _check_inputs(inputs: Sequence[Input], request: Request, card: ModelCard) -> None:
    """Refuse what the model cannot read or do. The API could not check it before it knew the model."""
    if unusable := unusable_option(request, card):
        field, reason = unusable
        raise PromptRefused(JobFailure.TEMPLATE, reason, field)
    for index, each in enumerate(inputs):
        if len(each.tokens) > card.context:
            raise refusal(request, card, index, len(each.tokens))
        _check_vocabulary(each.tokens, card)


def _check_capabilities(request: Request, card: ModelCard) -> None:
    """Refuse a request that was accepted before it was known what the model can do."""
    if (adapter := request.adapter) is not None:
        reason = (card.adapters or {}).get(adapter, "the worker does not have it")
        if reason:
            message = f"adapter: {adapter_problem(card.id, adapter, reason)}"
            raise PromptRefused(JobFailure.ADAPTER, message, field="adapter")
    if missing := missing_capability(request, card):
        field, reason = missing
        raise PromptRefused(JobFailure.TEMPLATE, f"{card.id} does not support {field}: {reason}.")
