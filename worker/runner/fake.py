"""A runner without a model: the same contract, deterministic words, and faults on demand.

The next token is a function of the prompt, the seed, the position and the token before, so a continued row says
what an undisturbed one says, or a test notices. Orders in the prompt:

    !words=N        the end token comes after N words
    !pause=S        each step takes S seconds longer while this row is in the batch
    !encode=S       tokenising the prompt takes S seconds
    !stall=N        from its Nth token on this row gets nothing
    !every=S        steps begin S seconds apart, or later, while this row is in the batch
    !clock=1        words are the moments at which they are said, to see how long they are on their way
    !row-fails=N    this row raises at its Nth token
    !step-fails=N   the whole step raises while this row is at its Nth token
    !no-memory=N    the whole step raises for want of memory while this row is at its Nth token
    !die=N          the process is gone at its Nth token

Orders in the config.json of its folder, if it has one:

    !load=S         loading takes S seconds, in pieces
    !load-fails=1   it fails half-way
"""

from __future__ import annotations

import codecs
import math
import os
import re
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from time import monotonic, sleep
from zlib import crc32

from shared.errors import JobFailure, PromptRefused
from shared.jobs.request import Request
from shared.models.catalog import CatalogModel
from shared.models.folder import ModelError
from shared.models.registry import ModelCard
from worker.runner.base import (
    UNKNOWN_COST,
    Media,
    OutOfMemory,
    PrefillWork,
    Prompt,
    Row,
    StepOutput,
    StepPlan,
    TokenOutput,
    Unread,
)

EOS = 256
FIRST_WORD = 257
WORDS = (  # noqa: SIM905 - easier to read than a list of 49
    "the a one two three small large river stone light morning evening paper water garden house road "
    "stays goes comes sings falls opens closes turns holds gives takes under over beside after before "
    "née naïve 東京 🙂 and or but then so still, again. never; ever: yes! no? perhaps"
).split()

TICKS_PER_S = 10_000
CLOCK_LAP = 1000 * TICKS_PER_S
"""Ticks after which the clock's words begin again."""
_FIRST_MOMENT = FIRST_WORD + 1000

_ORDER = re.compile(
    r"!(words|pause|every|clock|encode|stall|row-fails|step-fails|no-memory|die|load|load-fails)=([\d.]+)"
)
_PIECE_S = 0.02
"""Of a loading."""


def ticks() -> int:
    """This machine's monotonic clock, which all its processes share, in ticks and round a lap."""
    return int(monotonic() * TICKS_PER_S) % CLOCK_LAP


def _orders(prompt: str) -> dict[str, float]:
    return {name: float(value) for name, value in _ORDER.findall(prompt)}


class FakeDetokenizer:
    """Words as they are; the bytes of a prompt as UTF-8."""

    def __init__(self) -> None:
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> str:
        """The text of this token."""
        if token >= _FIRST_MOMENT:
            return f" @{token - _FIRST_MOMENT};"
        return f" {WORDS[token - FIRST_WORD]}" if token >= FIRST_WORD else self._bytes.decode(bytes([token]))

    def finish(self) -> str:
        """A character cut short."""
        return self._bytes.decode(b"", final=True)


class _RowFails(RuntimeError):
    """As ordered."""


@dataclass(slots=True)
class _FakeRow:
    """A row, and the orders its prompt gives."""

    row: Row
    position: int
    last: int
    digest: int
    orders: dict[str, float]
    unread: int

    @classmethod
    def of(cls, row: Row) -> _FakeRow:
        prompt = row.prompt[: len(row.prompt) - row.generated]
        text = bytes(token for token in prompt if token < EOS).decode(errors="replace")
        return cls(
            row=row,
            position=row.generated,
            last=row.prompt[-1],
            digest=crc32(f"{row.sampling.seed}:{text}".encode()),
            orders=_orders(text),
            unread=len(row.prompt),
        )

    def at(self, order: str) -> bool:
        """Whether this is the token that an order names, counted from 1."""
        return self.orders.get(order) == self.position + 1

    def may_go_on(self) -> bool:
        """Do what the prompt orders for the next token; False when the row is to get none.

        Raises:
            _RowFails: only this row fails. Any other exception is the whole step's.
        """
        if not self.orders:
            return True
        if self.at("die"):
            os._exit(9)
        if self.at("step-fails"):
            raise RuntimeError("the step fails, as ordered")
        if self.at("no-memory"):
            raise OutOfMemory("there is no memory, as ordered")
        if self.at("row-fails"):
            raise _RowFails("the row fails, as ordered")
        return self.orders.get("stall", math.inf) > self.position + 1

    def output(self) -> TokenOutput:
        """The next token, with log-probabilities if they are asked for."""
        position, asked = self.position, self.row.request.logprobs
        output = TokenOutput(self.row.uid, self.next())
        if asked is not None:
            # The chosen token is the most probable one, and words take the places behind it.
            output.logprob = best = -((self.digest + position) % 97) / 100
            words = (FIRST_WORD + (position + rank) % len(WORDS) for rank in range(asked))
            output.top_logprobs = tuple(
                (word if rank else output.token, best - rank) for rank, word in enumerate(words)
            )
        return output

    def next(self) -> int:
        """The next token."""
        if self.orders.get("words") == self.position:
            return EOS
        if "clock" in self.orders:
            self.position += 1
            return _FIRST_MOMENT + ticks()
        chosen = (self.digest ^ (self.position * 0x9E3779B1) ^ (self.last * 0x85EBCA6B)) * 0xC2B2AE35
        self.last = FIRST_WORD + (chosen >> 16) % len(WORDS)
        self.position += 1
        return self.last


class FakeRunner:
    """See `worker.runner.base.ModelRunner`. A token takes one byte of memory.

    Args:
        memory: bytes for caches.
        chunk: most tokens of a long prompt that are read in a step.
    """

    def __init__(
        self,
        model: str = "fake",
        context: int = 4096,
        memory: int = 1_000_000_000,
        weights_bytes: int = 0,
        chunk: int = 1_000_000,
    ) -> None:
        self.card = ModelCard(id=model, kind="fake", context=context)
        self.eos = frozenset({EOS})
        self.about: dict[str, object] = {"device": "none"}
        self.weights_bytes = weights_bytes
        self.cache_bytes = memory
        self.chunk = chunk
        self.depth = 1
        self.cost = UNKNOWN_COST
        self._rows: dict[int, _FakeRow] = {}
        self._stepped_at = 0.0

    def tokenize(self, request: Request) -> list[int]:
        """The bytes of the prompt, or of the messages one after another."""
        text = request.prompt
        if text is None:
            text = "\n".join(f"{each['role']}: {each['content']}" for each in request.messages or ())
        sleep(_orders(text).get("encode", 0.0))
        return list(text.encode())

    def prompt(
        self,
        tokens: Sequence[int],
        shared: int,
        request: Request,  # noqa: ARG002
        images: Mapping[str, bytes],  # noqa: ARG002
    ) -> Prompt:
        """The tokens as they are; images are ignored."""
        if not tokens or len(tokens) >= self.card.context:
            raise PromptRefused(JobFailure.CONTEXT_LENGTH, f"The prompt has {len(tokens)} tokens.")
        return Prompt(tuple(tokens), shared)

    def detokenizer(self) -> FakeDetokenizer:
        """Return a fresh one."""
        return FakeDetokenizer()

    def row_bytes(self, length: int) -> int:
        """A byte per token."""
        return length

    def batch_bytes(self, lengths: Sequence[int]) -> int:
        """A byte per token: nothing is padded."""
        return sum(lengths)

    def encode_bytes(self, media: Media | None) -> int:  # noqa: ARG002 - it sees nothing
        """None."""
        return 0

    def set_prefix_limit(self, most_bytes: int) -> None:
        """It keeps no prefixes."""

    def insert(self, rows: Sequence[Row]) -> None:
        """Add rows."""
        self._rows |= {row.uid: _FakeRow.of(row) for row in rows}

    def prefillable(self) -> dict[int, Unread]:
        """Rows whose prompt is not read."""
        return {
            uid: Unread(row.unread, len(row.row.prompt) - row.unread) for uid, row in self._rows.items() if row.unread
        }

    def images_waiting(self) -> None:
        """No images."""

    def execute(self, plan: StepPlan) -> StepOutput:
        """One token for each row that has its prompt, after doing what the prompts order."""
        self._keep_pace()
        prompt_tokens, prefilled = self._prefill(plan.prefill)
        failed: list[tuple[int, Exception]] = []
        tokens: list[TokenOutput] = []
        pause = 0.0
        for uid, row in self._rows.items():
            pause = max(pause, row.orders.get("pause", 0.0))
            try:
                if not row.unread and row.may_go_on():
                    tokens.append(row.output())
            except _RowFails as error:
                failed.append((uid, error))
        if pause:
            sleep(pause)
        self.remove(uid for uid, _ in failed)
        return StepOutput(
            tokens, dict.fromkeys(prefilled, 0), failed, prompt_tokens=prompt_tokens, predicted_s=float(prompt_tokens)
        )

    def _prefill(self, work: PrefillWork | None) -> tuple[int, list[int]]:
        """Read prompts; how many tokens, and which rows have all of theirs."""
        if work is None:
            return 0, []
        done = 0
        for row in (self._rows[uid] for uid in work.uids):
            read = row.unread if work.tokens is None else min(row.unread, work.tokens)
            row.unread -= read
            done += read
        return done, [uid for uid in work.uids if not self._rows[uid].unread]

    def _keep_pace(self) -> None:
        every = max((row.orders.get("every", 0.0) for row in self._rows.values() if row.orders), default=0.0)
        if every:
            sleep(max(0.0, self._stepped_at + every - monotonic()))
            self._stepped_at = monotonic()

    def remove(self, uids: Iterable[int]) -> None:
        """Drop rows."""
        for uid in uids:
            self._rows.pop(uid, None)

    def reset(self) -> None:
        """Drop every row."""
        self._rows.clear()

    def stats(self) -> dict[str, float]:
        """Nothing to report."""
        return {}

    def close(self) -> None:
        """Nothing to keep."""


def load(model: CatalogModel) -> Generator[float, None, FakeRunner]:
    """A fake under the name of the model that would be served, as large as the files of its weights."""
    config = model.path / "config.json"
    orders = _orders(config.read_text() if config.is_file() else "")
    pieces = math.ceil(orders.get("load", 0.0) / _PIECE_S)
    for piece in range(1, pieces + 1):
        sleep(_PIECE_S)
        yield piece / (pieces + 1)
        if "load-fails" in orders and 2 * piece >= pieces:
            raise ModelError(f"the model in {model.path} fails, as ordered")
    return FakeRunner(model.id, weights_bytes=model.measure())
