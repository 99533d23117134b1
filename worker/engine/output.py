"""From tokens to published text: detokenise, match stop strings, apply limits."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping

from shared.errors import JobFailure
from shared.jobs.log import Written
from shared.jobs.record import Status
from worker.engine.sequence import Sequence, SequenceOutput
from worker.runner.base import Detokenizer, OutOfMemory, TokenOutput

logger = logging.getLogger(__name__)


class ReplayError(Exception):
    """The tokens in the log do not give the text in the log: another model wrote it."""


class OutputProcessor:
    """Turns the tokens of a step into what is published of each sequence.

    Args:
        eos: ids of the tokens that end an answer.
        detokenizer: gives fresh ones, for the texts of single tokens; needed where log-probabilities are published.

    Attributes:
        tokens: how many tokens rows were given in `process`, end tokens included.
    """

    def __init__(self, eos: frozenset[int], detokenizer: Callable[[], Detokenizer] | None = None) -> None:
        self.tokens = 0
        self._eos = eos
        self._detokenizer = detokenizer
        self._texts: dict[int, str] = {}

    def process(self, rows: Mapping[int, Sequence], outputs: Iterable[TokenOutput]) -> list[SequenceOutput]:
        """Give rows their tokens, each until it ends. One whose text raises fails alone."""
        published = []
        for output in outputs:
            sequence = rows.get(output.uid)
            if sequence is None or sequence.ending is not None:  # it has failed, or ended with a token before
                continue
            self.tokens += 1
            try:
                result = self.push(sequence, output)
            except Exception as error:  # noqa: BLE001 - whatever it is, it is this row's
                result = row_failed(sequence, error)
            if result is not None:
                published.append(result)
        return published

    def push(self, sequence: Sequence, output: TokenOutput) -> SequenceOutput | None:
        """Take the next token of a sequence; the output to publish now, if any.

        Tokens are published together with the text that they complete; a later attempt regenerates unpublished ones.
        The end token counts as generated, as in mlx_lm.server, and is not published.
        """
        sequence.timings.token()
        if output.token in self._eos:
            return _end(sequence, "stop", output, end_tokens=1)
        text, stopped = _append(sequence, output)
        if sequence.request.logprobs is not None:
            for token in (output.token, *(token for token, _ in output.top_logprobs)):
                sequence.token_texts[token] = self._token_text(token)
        if stopped:
            output.finish_reason = "stop"
            return sequence.finish(Status.SUCCEEDED, text, reason="stop")
        if sequence.remaining <= 0:
            return _end(sequence, "length", output, text)
        return _published(sequence, text) if text else None

    def replay(self, sequence: Sequence, written: Written) -> SequenceOutput | None:
        """Continue from what earlier attempts wrote, without publishing it again.

        Returns:
            The sequence's end where nothing is left to generate.

        Raises:
            ReplayError: the log is not this model's.
        """
        if written.tokens:
            sequence.timings.forget_first_token()
        texts, end = [], None
        for token in written.tokens:
            text, stopped = _append(sequence, TokenOutput(sequence.uid, token))
            texts.append(text)
            if stopped:
                end = sequence.finish(Status.SUCCEEDED, reason="stop")
                break
        if end is None and sequence.remaining <= 0:
            end = _end(sequence, "length")
            texts.append(end.text)
        sequence.unpublished.clear()
        text = "".join(texts)
        if not text.startswith(written.text) or (end is None and text != written.text):
            raise ReplayError(sequence.job.id)
        return end and end._replace(text=text[len(written.text) :], outputs=())

    def _token_text(self, token: int) -> str:
        """Text of a token within a text.

        A detokenizer may hold text back and trim the first space. So this is the text that the token adds after itself.
        """
        if token not in self._texts and self._detokenizer is not None:
            once, twice = (_detokenized(self._detokenizer(), [token] * times) for times in (1, 2))
            self._texts[token] = twice[len(once) :]
        return self._texts.get(token, "")


def _detokenized(detokenizer: Detokenizer, tokens: Iterable[int]) -> str:
    return "".join(map(detokenizer.add, tokens)) + detokenizer.finish()


def _append(sequence: Sequence, output: TokenOutput) -> tuple[str, bool]:
    """Add a token; the text that may be published now, and whether a stop string ends it."""
    sequence.generated.append(output.token)
    sequence.unpublished.append(output)
    output.text = sequence.detokenizer.add(output.token)
    return sequence.stops.push(output.text)


def _published(sequence: Sequence, text: str) -> SequenceOutput:
    outputs, sequence.unpublished = tuple(sequence.unpublished), []
    return SequenceOutput(sequence, outputs, text)


def _end(
    sequence: Sequence, reason: str, output: TokenOutput | None = None, text: str = "", end_tokens: int = 0
) -> SequenceOutput:
    """End by the end token or the limit: text that was held back is published, up to a stop string."""
    tail, stopped = sequence.stops.push(sequence.detokenizer.finish())
    if not stopped:
        tail += sequence.stops.flush()
    reason = "stop" if stopped else reason
    if output is not None:
        output.finish_reason = reason
    return sequence.finish(Status.SUCCEEDED, text + tail, reason=reason, end_tokens=end_tokens)


def row_failed(sequence: Sequence, error: Exception) -> SequenceOutput:
    """Fail a sequence for an error of its own."""
    ids = {"job_id": sequence.job.id, "request_id": sequence.job.request_id}
    logger.error("row_failed", exc_info=error, extra=ids)
    if isinstance(error, OutOfMemory):
        return sequence.fail(JobFailure.MEMORY, "The worker has too little memory for this prompt and its answer.")
    return sequence.fail(JobFailure.ROW, "Generating this job's text failed.")
