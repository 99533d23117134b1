"""What is guessed from a row's own text, and how sure that is."""

from __future__ import annotations

import random

import pytest

from worker.runner.speculation.acceptance import LONGEST, Odds
from worker.runner.speculation.ngram import Lookup
from worker.runner.speculation.pass_cost import LENGTHS, PLAIN_AFTER, STALE, PassCosts


def test_what_followed_the_last_tokens_before_is_guessed() -> None:
    lookup = Lookup([1, 2, 3, 4, 5, 6, 7, 1, 2, 3])
    assert lookup.guess(3) == [4, 5, 6]
    assert lookup.length == 3


def test_two_tokens_in_common_are_enough_and_one_is_not() -> None:
    assert Lookup([1, 2, 3, 4, 9, 2, 3]).guess(2) == [4, 9]
    assert Lookup([1, 2, 3, 4, 9, 3]).guess(2) == []
    assert Lookup([]).guess(2) == Lookup([1]).guess(2) == Lookup([1, 2]).guess(2) == []


def test_three_in_common_go_before_two_and_the_newest_place_counts() -> None:
    assert Lookup([1, 2, 3, 4, 8, 2, 3, 5, 1, 2, 3]).guess(1) == [4]
    assert Lookup([1, 2, 3, 4, 8, 1, 2, 3, 5, 1, 2, 3]).guess(1) == [5]


def test_a_guess_goes_on_where_it_is_as_long_as_it_comes_true() -> None:
    """The newest place of the last three tokens would be another one."""
    lookup = Lookup([7, 8, 1, 2, 3, 4, 5, 9, 1, 2, 3, 6, 7, 8, 1])
    assert lookup.guess(4) == [2, 3, 4, 5]
    assert [lookup.add(token) for token in (2, 3)] == [True, True]
    assert (lookup.guess(2), lookup.length) == ([4, 5], 5)
    assert not lookup.add(6)
    assert lookup.guess(3) == [7, 8, 1]


def test_a_text_that_goes_round_is_guessed_round() -> None:
    lookup = Lookup([5, 6, 1, 2, 3, 1, 2, 3, 1, 2])
    assert lookup.guess(7) == [3, 1, 2, 3, 1, 2, 3]
    assert all(lookup.add(token) for token in (3, 1, 2, 3, 1, 2))
    assert Lookup([4] * 5).guess(3) == [4] * 3


def test_it_finds_what_a_search_finds_however_the_tokens_came() -> None:
    draw = random.Random(3)
    tokens = [draw.randrange(6) for _ in range(300)]
    lookup = Lookup(tokens[:40])
    for end in range(40, 300):
        followed = {
            tokens[i + 2] for i in range(end - 2) if tokens[i : i + 2] == tokens[end - 2 : end]
        }  # by two tokens alone
        assert {*lookup.guess(1)} <= followed
        assert bool(lookup.guess(1)) == bool(followed)
        at_once = Lookup(tokens[:end])
        assert bool(at_once.length) == bool(lookup.length)
        assert at_once.length <= lookup.length or lookup.length >= 2
        lookup.add(tokens[end])
        assert len(lookup) == end + 1


def test_the_odds_follow_what_came_true_of_late() -> None:
    odds = Odds()
    surer = [odds.of(length) for length in range(2, LONGEST + 1)]
    assert surer == sorted(surer)
    for _ in range(200):
        odds.learn(3, hit=True)
    assert odds.of(3) > 0.95
    assert odds.of(2) == surer[0]
    for _ in range(30):
        odds.learn(3, hit=False)
    assert odds.of(3) < 0.35


def test_longer_guesses_give_more_but_less_and_less() -> None:
    sums = Odds().expected(2, 16)
    gains = [after - before for before, after in zip([0.0, *sums], sums, strict=False)]
    assert gains[0] == Odds().of(2)
    assert gains == sorted(gains, reverse=True)
    assert gains[-1] > 0


def timed(plain_s: float = 1.0) -> PassCosts:
    costs = PassCosts()
    for _ in range(7):
        costs.plain(plain_s)
    return costs


def test_costs_are_medians_in_plain_steps() -> None:
    costs = timed(2.0)
    for seconds in (3.0, 90.0, 3.0):
        costs.verified(4, seconds)
    costs.plain(500.0)
    assert costs.of(4) == 1.5


def test_nothing_is_compared_before_plain_steps_were_timed_nor_when_that_is_long_ago() -> None:
    costs = PassCosts()
    assert not costs.known
    costs = timed()
    assert costs.known
    for _ in range(PLAIN_AFTER):
        assert costs.known
        costs.verified(4, 1.0)
    assert not costs.known
    costs.plain(1.0)
    assert costs.known
    assert not timed(0.0).known


@pytest.mark.parametrize("length", LENGTHS)
def test_what_was_never_tried_is_tried_and_what_was_dear_is_tried_again_in_time(length: int) -> None:
    costs = timed()
    assert costs.of(length) == 1
    costs.verified(length, 5.0)
    assert costs.of(length) == 5
    for _ in range(STALE + 1):
        costs.plain(1.0)
    assert costs.of(length) == 3
    costs.verified(length, 5.0)
    assert costs.of(length) == 5
