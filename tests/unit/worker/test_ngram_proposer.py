"""Drafts from a row's own text, their acceptance rate, and the cost of verifying them."""

from __future__ import annotations

import random

import pytest

from tests.support.runner import row
from worker.runner.decode_row import DecodeRow
from worker.runner.speculation.acceptance import MAX_MATCH, Acceptance
from worker.runner.speculation.ngram import INDEXED_TOKENS, NgramIndex, NgramProposer
from worker.runner.speculation.pass_cost import PassCost


def index_of(tokens: list[int]) -> NgramIndex:
    index = NgramIndex()
    index.extend(tokens)
    return index


def test_the_draft_is_what_followed_an_earlier_occurrence() -> None:
    index = index_of([1, 2, 3, 4, 5, 6, 7, 1, 2, 3])
    assert index.draft(3) == [4, 5, 6]
    assert index.match == 3


def test_a_match_needs_two_tokens() -> None:
    assert index_of([1, 2, 3, 4, 9, 2, 3]).draft(2) == [4, 9]
    assert index_of([1, 2, 3, 4, 9, 3]).draft(2) == []
    assert index_of([]).draft(2) == index_of([1]).draft(2) == index_of([1, 2]).draft(2) == []


def test_longer_matches_win_over_shorter_and_newer_over_older() -> None:
    assert index_of([1, 2, 3, 4, 8, 2, 3, 5, 1, 2, 3]).draft(1) == [4]
    assert index_of([1, 2, 3, 4, 8, 1, 2, 3, 5, 1, 2, 3]).draft(1) == [5]


def test_a_draft_continues_from_its_occurrence_while_it_is_accepted() -> None:
    """The newest occurrence of the last three tokens is a different one."""
    index = index_of([7, 8, 1, 2, 3, 4, 5, 9, 1, 2, 3, 6, 7, 8, 1])
    assert index.draft(4) == [2, 3, 4, 5]
    assert [index.add(token) for token in (2, 3)] == [True, True]
    assert (index.draft(2), index.match) == ([4, 5], 5)
    assert not index.add(6)
    assert index.draft(3) == [7, 8, 1]


def test_the_draft_of_a_repeating_text_repeats() -> None:
    index = index_of([5, 6, 1, 2, 3, 1, 2, 3, 1, 2])
    assert index.draft(7) == [3, 1, 2, 3, 1, 2, 3]
    assert all(index.add(token) for token in (3, 1, 2, 3, 1, 2))
    assert index_of([4] * 5).draft(3) == [4] * 3


def test_drafts_equal_those_of_a_linear_search() -> None:
    draw = random.Random(3)
    tokens = [draw.randrange(6) for _ in range(300)]
    index = index_of(tokens[:40])
    for end in range(40, 300):
        followed = {tokens[i + 2] for i in range(end - 2) if tokens[i : i + 2] == tokens[end - 2 : end]}
        assert {*index.draft(1)} <= followed
        assert bool(index.draft(1)) == bool(followed)
        at_once = index_of(tokens[:end])
        assert bool(at_once.match) == bool(index.match)
        assert at_once.match <= index.match or index.match >= 2
        index.add(tokens[end])
        assert len(index) == end + 1


def test_the_acceptance_rate_follows_recent_drafts() -> None:
    acceptance = Acceptance()
    prior = [acceptance.rate(length) for length in range(2, MAX_MATCH + 1)]
    assert prior == sorted(prior)
    for _ in range(200):
        acceptance.record(3, accepted=True)
    assert acceptance.rate(3) > 0.95
    assert acceptance.rate(2) == prior[0]
    for _ in range(30):
        acceptance.record(3, accepted=False)
    assert acceptance.rate(3) < 0.35


def test_each_further_draft_token_adds_less_to_the_expected_number() -> None:
    totals = Acceptance().expected(2, 16)
    gains = [after - before for before, after in zip([0.0, *totals], totals, strict=False)]
    assert gains[0] == Acceptance().rate(2)
    assert gains == sorted(gains, reverse=True)
    assert gains[-1] > 0


@pytest.mark.parametrize("length", [INDEXED_TOKENS * 4, INDEXED_TOKENS * 40])
def test_a_long_prompt_is_indexed_over_several_steps(length: int) -> None:
    """A step indexes at most `INDEXED_TOKENS`. There is no draft until the whole prompt is indexed."""
    prompt = [i % 97 for i in range(length + 1)]
    decoding, proposer = DecodeRow.after_prefill(row(1, prompt)), NgramProposer()
    indexed, total = [], 0
    while not proposer.expected([decoding], 4)[0]:
        indexed.append(len(proposer._indexes[1]) - total)
        total += indexed[-1]
        assert proposer.propose([decoding], 4) == [[]]
        assert len(indexed) < 100
    assert max(indexed) <= INDEXED_TOKENS
    assert len(indexed) >= length // INDEXED_TOKENS - 1
    assert proposer.propose([decoding], 4) == [[(prompt[-1] + 1 + i) % 97 for i in range(4)]]
    proposer.drop([1])
    assert proposer.propose([decoding], 4) == [[]]


def test_missed_tokens_are_indexed_later() -> None:
    """Tokens are missed while the batch has too many rows for speculation."""
    decoding, proposer = DecodeRow.after_prefill(row(1, [1, 2, 3, 4, 5, 1])), NgramProposer()
    proposer.expected([decoding], 4)
    for token in (2, 3, 4, 5, 1, 2, 3):
        decoding.advance()
        decoding.next_input = token
    assert proposer.expected([decoding], 2)[0]
    assert proposer.propose([decoding], 2) == [[4, 5]]
    assert len(proposer._indexes[1]) == 13


def test_the_cost_of_a_pass_is_relative_to_a_plain_step() -> None:
    cost = PassCost({1: 2.0, 3: 3.0, 5: 4.0, 9: 4.0, 17: 8.0}, sampling=0.5, attention=0.001)
    assert cost.ratio(rows=1, sampled_rows=0, length=2, position=0) == 1.5
    assert cost.ratio(rows=1, sampled_rows=0, length=3, position=0) == 1.75, "interpolated"
    assert cost.ratio(rows=2, sampled_rows=0, length=16, position=0) == 16.5 / 2.5, "extrapolated"
    assert cost.ratio(rows=1, sampled_rows=1, length=4, position=0) == (4 + 5 * 0.5) / 2.5
    assert cost.ratio(rows=1, sampled_rows=0, length=4, position=2000) == (4 + 5 * 2) / (2 + 2)
