"""Makes a claimed job's prompt, and reads what earlier attempts wrote."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from redis import RedisError

from shared.errors import Gone, JobFailure, PromptRefused
from shared.jobs.log import JobLog, Written
from shared.jobs.request import Request
from shared.queue.claims import ClaimedJob
from shared.queue.redis import passes
from shared.tokenizing.client import TokenizerBusy, TokenizerError, Tokenizing
from shared.tokenizing.messages import Tokenized, TokenizerSource
from worker.runner.base import ModelRunner, Prompt

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A job that can be submitted to its model's engine.

    Attributes:
        written: what earlier attempts wrote; None at the first attempt.
        new_tokens: ids of its prompt, if they were not stored with the job: later attempts reuse them.
    """

    prompt: Prompt
    written: Written | None
    new_tokens: tuple[int, ...] | None = None


class TryLater(Exception):
    """Something that the job needs is away for now: release the job."""


class Preparer:
    """Prepares the claimed jobs of one model; safe to be used by several threads.

    Args:
        sources: where the model's tokenizer is, best first.
        images: returns the files of a job's images by digest, as far as they are still there.
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
        """A job's prompt and what was written before.

        Raises:
            PromptRefused: the job fails with this `code` and message.
            TryLater: release the job.
            Exception: the job fails, for a reason that is not its own.
        """
        job = claimed.job
        try:
            written = self._log.written(job.id, job.last_event) if job.attempt > 1 else None
            found = self._tokenized(claimed, runner)
            images = self._images_of(job.id, claimed.request)
            prompt = runner.prompt(found.tokens, found.shared, claimed.request, images)
            return Prepared(prompt, written, found.tokens if claimed.tokens is None else None)
        except Gone as error:
            logger.error("job_not_continued", extra={"reason": str(error)})
            detail = "The job cannot be continued: a part of its log is gone."
            raise PromptRefused(JobFailure.LOG_LOST, detail) from error
        except TokenizerBusy as error:
            raise TryLater(str(error)) from error
        except RedisError as error:
            if not passes(error):
                raise
            raise TryLater(str(error)) from error

    def _tokenized(self, claimed: ClaimedJob, runner: ModelRunner) -> Tokenized:
        """The prompt's ids: those stored with the job, the runner's own, or a helper's."""
        if claimed.tokens is not None:
            return Tokenized(claimed.tokens, claimed.shared)
        own = runner.tokenize(claimed.request)
        return Tokenized(tuple(own)) if own is not None else self._ask(claimed.request, runner.card.context)

    def _ask(self, request: Request, context: int) -> Tokenized:
        """Ask a helper, with each source in turn until one works."""
        for source in self._sources():
            try:
                return self._tokenizing.tokenize(source, request, context=context)
            except TokenizerBusy:
                raise
            except TokenizerError as error:
                logger.warning("tokenizer_unusable", extra={"path": source.path, "reason": str(error)})
        raise TokenizerError("the model's tokenizer cannot be used from any source")

    def _images_of(self, job_id: str, request: Request) -> Mapping[str, bytes]:
        """The files that a request's messages name.

        Raises:
            PromptRefused: they are not all there any more.
        """
        digests = {part["image"] for part in request.image_parts}
        images = self._images(job_id, digests) if digests else {}
        if len(images) < len(digests):
            raise PromptRefused(JobFailure.IMAGE_LOST, "An image of this job is gone. Send the request again.")
        return images
