"""Runs rows with drafts that are known to be right or wrong."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle

import pytest

from tests.support.runner import step
from worker.runner.base import Row
from worker.runner.decode_row import DecodeRow
from worker.runner.model_runner import MLXRunner
from worker.runner.speculation.ngram import NgramProposer
from worker.runner.speculation.pass_cost import LENGTHS
from worker.runner.speculation.verification import Speculation

TokensByUid = dict[int, list[int]]


def run(runner: MLXRunner, rows: Sequence[Row], late: dict[int, list[Row]] | None = None) -> TokensByUid:
    """Step until all rows have generated all their tokens; `late` maps steps to the rows to insert before them."""
    tokens: TokensByUid = defaultdict(list)
    waiting = dict(late or {})
    expected = sum(each.max_new_tokens for each in [*rows, *(one for some in waiting.values() for one in some)])
    runner.insert(rows)
    for steps in range(2000):
        runner.insert(waiting.pop(steps, []))
        for output in step(runner).tokens:
            tokens[output.uid].append(output.token)
        if sum(map(len, tokens.values())) >= expected and not waiting:
            break
    assert not step(runner).tokens
    return tokens


def answers(plain: MLXRunner, rows: Sequence[Row]) -> TokensByUid:
    """Return the tokens of each row, run separately and without speculation."""
    return {each.uid: run(plain, [each])[each.uid] for each in rows}


@contextmanager
def drafting(rows: Sequence[Row], expected: TokensByUid, wrong: Callable[[int], bool]) -> Iterator[None]:
    """Draft the expected tokens in every step, in varying lengths.

    Args:
        wrong: whether the draft token at an index of the row is wrong.
    """
    whole = {each.uid: [*each.prompt, *expected[each.uid]] for each in rows}
    lengths = cycle(LENGTHS)

    def propose(_: NgramProposer, some: Sequence[DecodeRow], length: int) -> list[list[int]]:
        starts = [row.length + (row.next_input is not None) for row in some]
        texts = [whole[row.uid][start:][:length] for row, start in zip(some, starts, strict=True)]
        return [
            [token + wrong(start + i) for i, token in enumerate(text)]
            for text, start in zip(texts, starts, strict=True)
        ]

    def draft_length(_: Speculation, some: Sequence[DecodeRow]) -> int:
        remaining = min(row.remaining if row.sampled else 0 for row in some)
        return next((length for length in [next(lengths), *LENGTHS[::-1]] if length < remaining), 0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NgramProposer, "propose", propose)
        patch.setattr(Speculation, "draft_length", draft_length)
        yield


def every_fifth(index: int) -> bool:
    return index % 5 == 3


def counts(runner: MLXRunner) -> tuple[float, float]:
    """Return the numbers of verified and of accepted draft tokens."""
    stats = runner.stats()
    return stats["speculation_drafted_tokens_total"], stats["speculation_accepted_tokens_total"]
