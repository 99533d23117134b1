"""The message of a sequence: what each token adds to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

from shared.queue.claims import ClaimedJob
from worker.output.content_tokens import ContentTokens
from worker.output.format import Part
from worker.output.parser import CONTENT_TOKENS, Delta, MessageParser, merged, message_parser
from worker.runner.base import ModelRunner


class MessageOutput:
    """Collects the deltas of a message until they are published.

    All of it depends only on the tokens. So a later attempt that replays them continues with the same deltas.

    Args:
        content_tokens: finds the tokens whose log-probabilities belong to the content; None if none are requested.

    Attributes:
        reasoning_tokens: number of tokens of reasoning, with its markers.
    """

    def __init__(self, parser: MessageParser, content_tokens: ContentTokens | None = None) -> None:
        self.reasoning_tokens = 0
        self._parser = parser
        self._content_tokens = content_tokens
        self._unpublished: list[Delta] = []

    @classmethod
    def of(cls, claimed: ClaimedJob, prompt: Sequence[int], runner: ModelRunner) -> Self:
        """Return the empty message of a job.

        Args:
            prompt: token ids of the prompt.
        """
        request = claimed.request
        tools = () if request.tool_choice == "none" else request.tools or ()
        parser = message_parser(
            runner.message_format, prompt, tools, claimed.job.id, parallel_calls=request.parallel_tool_calls
        )
        return cls(parser, None if request.logprobs is None else ContentTokens())

    @property
    def complete(self) -> bool:
        """Whether the message needs no further text."""
        return self._parser.done

    def add_token(self, token_text: str, text: str) -> None:
        """Add a token.

        Args:
            token_text: the text that it completes.
            text: the text that may be published now; see `worker.engine.stops`.
        """
        if self._content_tokens is not None:
            self._content_tokens.add_token(token_text)
        before = self._parser.part
        self._collect(self._parser.push(text))
        if Part.REASONING in (before, self._parser.part):
            self.reasoning_tokens += 1

    def add_tail(self, text: str) -> None:
        """Add text of earlier tokens that was held back until the end."""
        if self._content_tokens is not None:
            self._content_tokens.add_text(text)
        self._collect(self._parser.push(text))

    def take(self) -> Delta:
        """Return what is new since the last call."""
        deltas, self._unpublished = self._unpublished, []
        return merged(deltas)

    def finish(self) -> Delta:
        """Return the rest of the message."""
        self._collect(self._parser.finish())
        return self.take()

    def _collect(self, delta: Delta) -> None:
        if self._content_tokens is not None and (runs := self._content_tokens.of(self._parser.spans)):
            delta[CONTENT_TOKENS] = runs
        if delta:
            self._unpublished.append(delta)
