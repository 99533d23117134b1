"""Turns tokens into published text: detokenises, matches stop strings, applies limits."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping

from shared.errors import JobFailure
from shared.jobs.inputs import result_line, result_lines
from shared.jobs.log import Written
from shared.jobs.record import Status
from shared.models.capabilities import adapter_problem
from worker.engine.sequence import Sequence, SequenceOutput
from worker.runner.base import (
    AdapterFailed,
    ConstraintFailed,
    Detokenizer,
    InputResult,
    InvalidLogits,
    OutOfMemory,
    RowInputs,
    TokenOutput,
)

logger = logging.getLogger(__name__)


class ReplayError(Exception):
    """The tokens in the log do not give the text in the log, so another model wrote it."""


class OutputProcessor:
    """Turns the tokens of a step into output to publish.

    Args:
        eos: ids of the tokens that end an answer.
        detokenizer: returns a fresh detokenizer, for the texts of single tokens. Needed to publish log-probabilities.

    Attributes:
        tokens: number of tokens processed, including end tokens.
    """

    def __init__(self, eos: frozenset[int], detokenizer: Callable[[], Detokenizer] | None = None) -> None:
        self.tokens = 0
        self._eos = eos
        self._detokenizer = detokenizer
        self._texts: dict[int, str] = {}

    def process(self, rows: Mapping[int, Sequence], outputs: Iterable[TokenOutput]) -> list[SequenceOutput]:
        """Push the tokens of a step to their rows. A row that raises fails alone."""
        published = []
        for output in outputs:
            sequence = rows.get(output.uid)
            if sequence is None or sequence.ending is not None:  # it failed, or ended with an earlier token
                continue
            self.tokens += 1
            try:
                result = self.push(sequence, output)
            except Exception as error:  # noqa: BLE001 - any error belongs to this row
                result = row_failed(sequence, error)
            if result is not None:
                published.append(result)
        return published

    def push(self, sequence: Sequence, output: TokenOutput) -> SequenceOutput | None:
        """Push the next token of a sequence; return the output to publish now, if any.

        A token is published with the text that it completes. Unpublished tokens are generated again by a later attempt.
        The end token counts as generated, as in mlx_lm.server, but is not published.
        """
        sequence.timings.token()
        if output.token in self._eos:
            return _end(sequence, "stop", output, end_tokens=1)
        text, stopped = _append(sequence, output)
        if sequence.request.logprobs is not None:
            self._set_token_texts(sequence, output)
        if stopped:
            output.finish_reason = "stop"
            return sequence.finish(Status.SUCCEEDED, text, reason="stop")
        if sequence.remaining <= 0:
            return _end(sequence, "length", output, text)
        return _published(sequence, text) if text else None

    def replay(self, sequence: Sequence, written: Written) -> SequenceOutput | None:
        """Continue from what earlier attempts wrote, without publishing it again.

        Returns:
            The end of the sequence, if there is nothing left to generate.

        Raises:
            ReplayError: another model wrote the log.
        """
        if written.tokens:
            sequence.timings.forget_first_token()
        texts, end = [], None
        for token in written.tokens:
            text, stopped = _append(sequence, TokenOutput(sequence.uid, token))
            texts.append(text)
            if sequence.message is not None:
                sequence.message.take()  # its parts are in the log
            if stopped:
                end = sequence.finish(Status.SUCCEEDED, reason="stop")
                break
        if end is None and sequence.remaining <= 0:
            end = _end(sequence, "length")
            texts.append(end.text)
        sequence.unpublished.clear()
        text = "".join(texts)
        if text.startswith(" " + written.text):  # by a worker of an earlier version, which trimmed the first space
            text = text[1:]
        if not text.startswith(written.text) or (end is None and text != written.text):
            raise ReplayError(sequence.job.id)
        return end and end._replace(text=text[len(written.text) :], outputs=())

    def _set_token_texts(self, sequence: Sequence, output: TokenOutput) -> None:
        """Set the texts of a token and its alternatives. The texts of an answer's tokens add up to the answer."""
        tokens = (output.token, *(token for token, _ in output.top_logprobs))
        if len(sequence.generated) == 1 and self._detokenizer is not None:
            sequence.first_output = output
            sequence.first_texts = {token: _detokenized(self._detokenizer(), [token]) for token in tokens}
            return
        sequence.token_texts |= {token: self._token_text(token) for token in tokens}

    def _token_text(self, token: int) -> str:
        """Return the text of a token inside a longer text.

        A detokenizer may hold text back and trim the first space. So this is the text that the token adds when it comes
        a second time.
        """
        if token not in self._texts and self._detokenizer is not None:
            once, twice = (_detokenized(self._detokenizer(), [token] * times) for times in (1, 2))
            self._texts[token] = twice[len(once) :]
        return self._texts.get(token, "")


def replay_results(sequence: Sequence, inputs: RowInputs, written: Written) -> SequenceOutput | None:
    """Continue from the results that earlier attempts wrote. Returns the end of the sequence if none is missing."""
    inputs.pending.difference_update(result_lines(written.text))
    return None if inputs.pending else sequence.finish(Status.SUCCEEDED)


def publish_results(rows: Mapping[int, Sequence], results: Iterable[InputResult]) -> list[SequenceOutput]:
    """Publish the results of inputs. A sequence ends with the result of its last input."""
    lines: dict[int, list[str]] = {}
    for result in results:
        lines.setdefault(result.uid, []).append(result_line(result.index, result.encoded))
    published = []
    for uid, texts in lines.items():
        sequence = rows.get(uid)
        if sequence is None or sequence.prompt.inputs is None or sequence.ending is not None:
            continue
        text, pending = "".join(texts), sequence.prompt.inputs.pending
        published.append(SequenceOutput(sequence, text=text) if pending else sequence.finish(Status.SUCCEEDED, text))
    return published


def _detokenized(detokenizer: Detokenizer, tokens: Iterable[int]) -> str:
    return "".join(map(detokenizer.add, tokens)) + detokenizer.finish()


def _append(sequence: Sequence, output: TokenOutput) -> tuple[str, bool]:
    """Add a token; return the text that may be published now, and whether it ends the answer.

    A stop string ends it, or a tool call after which the request allows no other.
    """
    sequence.generated.append(output.token)
    sequence.unpublished.append(output)
    output.text = sequence.detokenizer.add(output.token)
    text, stopped = sequence.stops.push(output.text)
    if sequence.message is None:
        return text, stopped
    sequence.message.add_token(output.text, text)
    return text, stopped or sequence.message.complete


def _published(sequence: Sequence, text: str) -> SequenceOutput:
    outputs, sequence.unpublished = tuple(sequence.unpublished), []
    return SequenceOutput(sequence, outputs, text, sequence.message.take() if sequence.message else None)


def _end(
    sequence: Sequence, reason: str, output: TokenOutput | None = None, text: str = "", end_tokens: int = 0
) -> SequenceOutput:
    """End by the end token or the length limit, with the text held back, up to a stop string in it."""
    tail, stopped = sequence.stops.push(sequence.detokenizer.finish())
    if not stopped:
        tail += sequence.stops.flush()
    if sequence.message is not None:
        sequence.message.add_tail(tail)
    reason = "stop" if stopped else reason
    if output is not None:
        output.finish_reason = reason
    return sequence.finish(Status.SUCCEEDED, text + tail, reason=reason, end_tokens=end_tokens)


def row_failed(sequence: Sequence, error: Exception) -> SequenceOutput:
    """Fail a sequence because of an error that it caused."""
    ids = {"job_id": sequence.job.id, "request_id": sequence.job.request_id}
    logger.error("row_failed", exc_info=error, extra=ids)
    if isinstance(error, OutOfMemory):
        return sequence.fail(JobFailure.MEMORY, "The worker has too little memory for this prompt and its answer.")
    if isinstance(error, InvalidLogits):
        return sequence.fail(JobFailure.ROW, "The model produced invalid numbers (NaN or infinity) for this job.")
    if isinstance(error, AdapterFailed):
        problem = adapter_problem(sequence.job.model, sequence.request.adapter or "", str(error))
        return sequence.fail(JobFailure.ADAPTER, f"adapter: {problem}")
    if isinstance(error, ConstraintFailed):
        return sequence.fail(JobFailure.CONSTRAINT, f"The answer's constraint could not be followed: {error}")
    return sequence.fail(JobFailure.ROW, "Generating this job's text failed.")
