"""Drafts from a row's own text, how sure they are, and what verifying them costs."""

from __future__ import annotations

import random

import pytest

from tests.support.runner import row
from worker.runner.decode_row import DecodeRow
from worker.runner.speculation.acceptance import MAX_MATCH, Acceptance
from worker.runner.speculation.ngram import INDEXED_TOKENS, NgramIndex, NgramProposer
from worker.runner.speculation.pass_cost import PassCost


def of(tokens: list[int]) -> NgramIndex:
    index = NgramIndex()
    index.extend(tokens)
    return index


def test_what_followed_the_last_tokens_before_is_guessed() -> None:
    index = of([1, 2, 3, 4, 5, 6, 7, 1, 2, 3])
    assert index.draft(3) == [4, 5, 6]
    assert index.match == 3


def test_two_tokens_in_common_are_enough_and_one_is_not() -> None:
    assert of([1, 2, 3, 4, 9, 2, 3]).draft(2) == [4, 9]
    assert of([1, 2, 3, 4, 9, 3]).draft(2) == []
    assert of([]).draft(2) == of([1]).draft(2) == of([1, 2]).draft(2) == []


def test_three_in_common_go_before_two_and_the_newest_place_counts() -> None:
    assert of([1, 2, 3, 4, 8, 2, 3, 5, 1, 2, 3]).draft(1) == [4]
    assert of([1, 2, 3, 4, 8, 1, 2, 3, 5, 1, 2, 3]).draft(1) == [5]


def test_a_guess_goes_on_where_it_is_as_long_as_it_comes_true() -> None:
    """The newest place of the last three tokens would be another one."""
    index = of([7, 8, 1, 2, 3, 4, 5, 9, 1, 2, 3, 6, 7, 8, 1])
    assert index.draft(4) == [2, 3, 4, 5]
    assert [index.add(token) for token in (2, 3)] == [True, True]
    assert (index.draft(2), index.match) == ([4, 5], 5)
    assert not index.add(6)
    assert index.draft(3) == [7, 8, 1]


def test_a_text_that_goes_round_is_guessed_round() -> None:
    index = of([5, 6, 1, 2, 3, 1, 2, 3, 1, 2])
    assert index.draft(7) == [3, 1, 2, 3, 1, 2, 3]
    assert all(index.add(token) for token in (3, 1, 2, 3, 1, 2))
    assert of([4] * 5).draft(3) == [4] * 3


def test_it_finds_what_a_search_finds_however_the_tokens_came() -> None:
    draw = random.Random(3)
    tokens = [draw.randrange(6) for _ in range(300)]
    index = of(tokens[:40])
    for end in range(40, 300):
        followed = {
            tokens[i + 2] for i in range(end - 2) if tokens[i : i + 2] == tokens[end - 2 : end]
        }  # by two tokens alone
        assert {*index.draft(1)} <= followed
        assert bool(index.draft(1)) == bool(followed)
        at_once = of(tokens[:end])
        assert bool(at_once.match) == bool(index.match)
        assert at_once.match <= index.match or index.match >= 2
        index.add(tokens[end])
        assert len(index) == end + 1


def test_the_acceptance_follow_what_came_true_of_late() -> None:
    acceptance = Acceptance()
    surer = [acceptance.rate(length) for length in range(2, MAX_MATCH + 1)]
    assert surer == sorted(surer)
    for _ in range(200):
        acceptance.record(3, accepted=True)
    assert acceptance.rate(3) > 0.95
    assert acceptance.rate(2) == surer[0]
    for _ in range(30):
        acceptance.record(3, accepted=False)
    assert acceptance.rate(3) < 0.35


def test_longer_guesses_give_more_but_less_and_less() -> None:
    sums = Acceptance().expected(2, 16)
    gains = [after - before for before, after in zip([0.0, *sums], sums, strict=False)]
    assert gains[0] == Acceptance().rate(2)
    assert gains == sorted(gains, reverse=True)
    assert gains[-1] > 0


@pytest.mark.parametrize("length", [INDEXED_TOKENS * 4, INDEXED_TOKENS * 40])
def test_a_long_prompt_is_indexed_bit_by_bit(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """No step takes in more than so many tokens, however long the prompt is; until it has all there is no draft."""
    prompt = [i % 97 for i in range(length + 1)]
    decoding, proposer = DecodeRow.after_prefill(row(1, prompt)), NgramProposer()
    seen, known = [], 0
    while not proposer.expected([decoding], 4)[0]:
        seen.append(len(proposer._indexes[1]) - known)
        known += seen[-1]
        assert proposer.propose([decoding], 4) == [[]]
        assert len(seen) < 100
    assert max(seen) <= INDEXED_TOKENS
    assert len(seen) >= length // INDEXED_TOKENS - 1
    assert proposer.propose([decoding], 4) == [[(prompt[-1] + 1 + i) % 97 for i in range(4)]]
    proposer.drop([1])
    assert proposer.propose([decoding], 4) == [[]]


def test_tokens_that_were_missed_are_taken_in_later() -> None:
    """As when more rows than can be drafted for were in the batch meanwhile."""
    decoding, proposer = DecodeRow.after_prefill(row(1, [1, 2, 3, 4, 5, 1])), NgramProposer()
    proposer.expected([decoding], 4)
    for token in (2, 3, 4, 5, 1, 2, 3):
        decoding.advance()
        decoding.next_input = token
    assert proposer.expected([decoding], 2)[0]
    assert proposer.propose([decoding], 2) == [[4, 5]]
    assert len(proposer._indexes[1]) == 13


def test_what_a_pass_costs_is_told_in_plain_steps() -> None:
    cost = PassCost({1: 2.0, 3: 3.0, 5: 4.0, 9: 4.0, 17: 8.0}, sampling=0.5, attention=0.001)
    assert cost.ratio(rows=1, sampled_rows=0, length=2, position=0) == 1.5
    assert cost.ratio(rows=1, sampled_rows=0, length=3, position=0) == 1.75, "between two that were measured"
    assert cost.ratio(rows=2, sampled_rows=0, length=16, position=0) == 16.5 / 2.5, "beyond what was measured"
    assert cost.ratio(rows=1, sampled_rows=1, length=4, position=0) == (4 + 5 * 0.5) / 2.5
    assert cost.ratio(rows=1, sampled_rows=0, length=4, position=2000) == (4 + 5 * 2) / (2 + 2)
