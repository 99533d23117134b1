"""A runner without a model, for tests and demonstrations: deterministic words, and faults on demand.

The next token is a function of the prompt, the seed, the position and the previous token. So a row that continues after
an interruption generates the same words as an uninterrupted one. Directives in the prompt control the row:

    !words=N        end the answer after N words
    !pause=S        make each step S seconds longer while this row is in the batch
    !encode=S       take S seconds to tokenise the prompt
    !stall=N        generate nothing from token N on
    !every=S        begin steps at least S seconds apart while this row is in the batch
    !clock=1        generate timestamps instead of words, to measure the delivery delay
    !row-fails=N    raise an error for this row at token N
    !step-fails=N   raise an error for the whole step at token N
    !no-memory=N    raise `OutOfMemory` for the whole step at token N
    !die=N          kill the process at token N

Directives in the model folder's config.json, if it exists, control the loading:

    !load=S         take S seconds to load, in short steps
    !load-fails=1   fail half-way
"""

from __future__ import annotations

import codecs
import math
import os
import re
import sys
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from time import monotonic, sleep
from typing import Self
from zlib import crc32

from shared.errors import JobFailure, PromptRefused
from shared.jobs.request import Request
from shared.models.catalog import CatalogModel
from shared.models.folder import ModelError
from shared.models.registry import ModelCard
from worker.output.format import PLAIN
from worker.runner.base import (
    Media,
    OutOfMemory,
    PrefillWork,
    Prompt,
    RemainingPrompt,
    Row,
    StepOutput,
    StepPlan,
    TokenOutput,
)
from worker.runner.cost import UNKNOWN_COST

EOS = 256
FIRST_WORD = 257
WORDS = (  # noqa: SIM905 - easier to read than a list of 49
    "the a one two three small large river stone light morning evening paper water garden house road "
    "stays goes comes sings falls opens closes turns holds gives takes under over beside after before "
    "née naïve 東京 🙂 and or but then so still, again. never; ever: yes! no? perhaps"
).split()

TICKS_PER_S = 10_000
CLOCK_LAP = 1000 * TICKS_PER_S
"""Ticks after which the clock restarts at 0."""
_FIRST_TIMESTAMP = FIRST_WORD + 1000

_DIRECTIVE = re.compile(
    r"!(words|pause|every|clock|encode|stall|row-fails|step-fails|no-memory|die|load|load-fails)=([\d.]+)"
)
_LOAD_STEP_S = 0.02
"""Seconds per step of the loading."""


def ticks() -> int:
    """Return the machine's monotonic clock, which all its processes share, in ticks modulo `CLOCK_LAP`."""
    return int(monotonic() * TICKS_PER_S) % CLOCK_LAP


def _directives(text: str) -> dict[str, float]:
    return {name: float(value) for name, value in _DIRECTIVE.findall(text)}


class FakeDetokenizer:
    """Decodes words, timestamps, and the bytes of a prompt as UTF-8."""

    def __init__(self) -> None:
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> str:
        """See `Detokenizer.add`."""
        if token >= _FIRST_TIMESTAMP:
            return f" @{token - _FIRST_TIMESTAMP};"
        return f" {WORDS[token - FIRST_WORD]}" if token >= FIRST_WORD else self._bytes.decode(bytes([token]))

    def finish(self) -> str:
        """See `Detokenizer.finish`."""
        return self._bytes.decode(b"", final=True)


class _RowError(RuntimeError):
    """The error of the directive `!row-fails`."""


@dataclass
class FakeRow:
    """A row, and the directives in its prompt.

    Attributes:
        position: answer position of the next token.
        previous: the previous token.
        digest: hash of the seed and the prompt.
        remaining: number of prompt tokens not prefilled yet.
    """

    row: Row
    position: int
    previous: int
    digest: int
    directives: dict[str, float]
    remaining: int

    @classmethod
    def of(cls, row: Row) -> Self:
        """Return a row with the directives in its prompt."""
        prompt = row.prompt[: len(row.prompt) - row.generated]
        text = bytes(token for token in prompt if token < EOS).decode(errors="replace")
        return cls(
            row=row,
            position=row.generated,
            previous=row.prompt[-1],
            digest=crc32(f"{row.sampling.seed}:{row.request.adapter or ''}{text}".encode()),
            directives=_directives(text),
            remaining=len(row.prompt),
        )

    def applies(self, directive: str) -> bool:
        """Return whether a directive names the next token, counted from 1."""
        return self.directives.get(directive) == self.position + 1

    def follow_directives(self) -> bool:
        """Do what the directives say about the next token. Returns whether the row generates a token.

        Raises:
            _RowError: only this row fails.
            Exception: the whole step fails.
        """
        if not self.directives:
            return True
        if self.applies("die"):
            os._exit(9)
        if self.applies("step-fails"):
            raise RuntimeError("the prompt contains !step-fails")
        if self.applies("no-memory"):
            raise OutOfMemory("the prompt contains !no-memory")
        if self.applies("row-fails"):
            raise _RowError("the prompt contains !row-fails")
        return self.directives.get("stall", math.inf) > self.position + 1

    def output(self) -> TokenOutput:
        """Generate the next token, with log-probabilities if the request asks for them."""
        position, alternatives = self.position, self.row.request.logprobs
        output = TokenOutput(self.row.uid, self.next())
        if alternatives is not None:
            # The chosen token is the most likely one, and words follow it in the ranking.
            output.logprob = best = -((self.digest + position) % 97) / 100
            words = (FIRST_WORD + (position + rank) % len(WORDS) for rank in range(alternatives))
            output.top_logprobs = tuple(
                (word if rank else output.token, best - rank) for rank, word in enumerate(words)
            )
        return output

    def next(self) -> int:
        """Choose the next token and advance the position."""
        if self.directives.get("words") == self.position:
            return EOS
        if "clock" in self.directives:
            self.position += 1
            return _FIRST_TIMESTAMP + ticks()
        mixed = (self.digest ^ (self.position * 0x9E3779B1) ^ (self.previous * 0x85EBCA6B)) * 0xC2B2AE35
        self.previous = FIRST_WORD + (mixed >> 16) % len(WORDS)
        self.position += 1
        return self.previous


class FakeRunner:
    """See `worker.runner.base.ModelRunner`. Each token takes one byte of cache.

    Args:
        model: id of the model.
        context: maximum tokens of prompt and answer.
        memory: bytes for caches.
        chunk: maximum tokens per chunk of a long prompt.
        adapters: names of adapters; each gives other words.
        adapter_slots: see `ModelRunner`.
    """

    def __init__(
        self,
        model: str = "fake",
        context: int = 4096,
        memory: int = 1_000_000_000,
        weights_bytes: int = 0,
        chunk: int = 1_000_000,
        adapters: Iterable[str] = (),
        adapter_slots: int = sys.maxsize,
    ) -> None:
        self.card = ModelCard(id=model, kind="fake", context=context, adapters=dict.fromkeys(adapters, ""))
        self.adapter_slots = adapter_slots
        self.eos = frozenset({EOS})
        self.message_format = PLAIN
        self.about: dict[str, object] = {"device": "none"}
        self.weights_bytes = weights_bytes
        self.cache_bytes = memory
        self.chunk = chunk
        self.depth = 1
        self.cost = UNKNOWN_COST
        self._rows: dict[int, FakeRow] = {}
        self._step_started = 0.0

    def tokenize(self, request: Request) -> list[int]:
        """Return the bytes of the prompt, or of all messages."""
        text = request.prompt
        if text is None:
            text = "\n".join(f"{message['role']}: {message['content']}" for message in request.messages or ())
        sleep(_directives(text).get("encode", 0.0))
        return list(text.encode())

    def prompt(
        self,
        tokens: Sequence[int],
        shared: int,
        request: Request,  # noqa: ARG002
        images: Mapping[str, bytes],  # noqa: ARG002
    ) -> Prompt:
        """Return the tokens unchanged. Ignores images."""
        if not tokens or len(tokens) >= self.card.context:
            raise PromptRefused(JobFailure.CONTEXT_LENGTH, f"The prompt has {len(tokens)} tokens.")
        return Prompt(tuple(tokens), shared)

    def detokenizer(self) -> FakeDetokenizer:
        """See `ModelRunner.detokenizer`."""
        return FakeDetokenizer()

    def row_bytes(self, length: int) -> int:
        """Return one byte per token."""
        return length

    def batch_bytes(self, lengths: Sequence[int]) -> int:
        """Return one byte per token, without padding."""
        return sum(lengths)

    def encode_bytes(self, media: Media | None) -> int:  # noqa: ARG002 - no images
        """Return 0."""
        return 0

    def set_prefix_limit(self, max_bytes: int) -> None:
        """Do nothing: this runner stores no prefixes."""

    def erase_prefixes(self, cutoffs: Mapping[str, float]) -> None:
        """Do nothing, as `set_prefix_limit`."""

    def insert(self, rows: Sequence[Row]) -> None:
        """See `ModelRunner.insert`."""
        self._rows |= {row.uid: self.make_row(row) for row in rows}

    def make_row(self, row: Row) -> FakeRow:
        """Return a row that generates words."""
        return FakeRow.of(row)

    def prefillable(self) -> dict[int, RemainingPrompt]:
        """See `ModelRunner.prefillable`."""
        return {
            uid: RemainingPrompt(row.remaining, len(row.row.prompt) - row.remaining)
            for uid, row in self._rows.items()
            if row.remaining
        }

    def next_image_s(self) -> None:
        """Return None: this runner ignores images."""

    def execute(self, plan: StepPlan) -> StepOutput:
        """Generate one token for each prefilled row, following the directives of all prompts."""
        self._wait_for_step()
        prompt_tokens, prefilled = self._prefill(plan.prefill)
        failed: list[tuple[int, Exception]] = []
        tokens: list[TokenOutput] = []
        pause = 0.0
        for uid, row in self._rows.items():
            pause = max(pause, row.directives.get("pause", 0.0))
            try:
                if not row.remaining and row.follow_directives():
                    tokens.append(row.output())
            except _RowError as error:
                failed.append((uid, error))
        if pause:
            sleep(pause)
        self.remove(uid for uid, _ in failed)
        return StepOutput(
            tokens, dict.fromkeys(prefilled, 0), failed, prompt_tokens=prompt_tokens, predicted_s=float(prompt_tokens)
        )

    def _prefill(self, work: PrefillWork | None) -> tuple[int, list[int]]:
        """Prefill rows. Returns the number of tokens processed and the rows that are complete."""
        if work is None:
            return 0, []
        total = 0
        for row in (self._rows[uid] for uid in work.uids):
            tokens = row.remaining if work.tokens is None else min(row.remaining, work.tokens)
            row.remaining -= tokens
            total += tokens
        return total, [uid for uid in work.uids if not self._rows[uid].remaining]

    def _wait_for_step(self) -> None:
        """Follow the directive `!every`."""
        every = max((row.directives.get("every", 0.0) for row in self._rows.values() if row.directives), default=0.0)
        if every:
            sleep(max(0.0, self._step_started + every - monotonic()))
            self._step_started = monotonic()

    def remove(self, uids: Iterable[int]) -> None:
        """See `ModelRunner.remove`."""
        for uid in uids:
            self._rows.pop(uid, None)

    def reset(self) -> None:
        """See `ModelRunner.reset`."""
        self._rows.clear()

    def stats(self) -> dict[str, float]:
        """Return nothing: there are no statistics."""
        return {}

    def close(self) -> None:
        """Do nothing: there is nothing to write."""


def load(model: CatalogModel) -> Generator[float, None, FakeRunner]:
    """Return a fake runner with the id of a catalog model and the size of its weight files.

    Yields:
        The progress, 0 to 1.

    Raises:
        ModelError: config.json contains `!load-fails`.
    """
    config = model.path / "config.json"
    directives = _directives(config.read_text() if config.is_file() else "")
    steps = math.ceil(directives.get("load", 0.0) / _LOAD_STEP_S)
    for step in range(1, steps + 1):
        sleep(_LOAD_STEP_S)
        yield step / (steps + 1)
        if "load-fails" in directives and 2 * step >= steps:
            raise ModelError(f"{config} contains !load-fails")
    return FakeRunner(model.id, weights_bytes=model.measure(), adapters=model.adapters)
