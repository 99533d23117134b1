"""The text before the first stop string is published, however the text is split into tokens."""

from __future__ import annotations

import tracemalloc
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from worker.engine.stops import StopMatcher

TEXT = st.text(alphabet="abc é", max_size=40)
STOPS = st.lists(st.text(alphabet="abc é", min_size=1, max_size=5), max_size=4)


def before_the_stop(text: str, stops: list[str]) -> tuple[str, bool]:
    """A simple reference implementation: check all stop strings after each character."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(map(len, complete))], True
    return text, False


def split(text: str, cuts: list[int]) -> list[str]:
    edges = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    return [text[start:end] for start, end in pairwise(edges)]


@given(text=TEXT, stops=STOPS, cuts=st.lists(st.integers(0, 99), max_size=20))
def test_exactly_the_text_before_the_first_stop_is_published(text: str, stops: list[str], cuts: list[int]) -> None:
    matcher, published, stopped = StopMatcher(stops), "", False
    expected, expected_stop = before_the_stop(text, stops)
    for part in split(text, cuts):
        more, stopped = matcher.push(part)
        published += more
        assert expected.startswith(published)
        if stopped:
            break
    published += matcher.flush()
    assert (published, stopped) == (expected, expected_stop)


def test_the_beginning_of_a_stop_is_held_back_until_it_is_decided() -> None:
    matcher = StopMatcher(["\n\n", "END"])
    assert matcher.push("one\n") == ("one", False)
    assert matcher.push("two E") == ("\ntwo ", False)
    assert matcher.push("N") == ("", False)
    assert matcher.push("E\n") == ("ENE", False)
    assert matcher.push("\nthree") == ("", True)
    assert matcher.flush() == ""


def test_the_stop_that_is_complete_first_wins() -> None:
    for stops, text, matched in ((["bcd", "c"], "ab", "c"), (["c", "bc"], "a", "bc")):
        matcher = StopMatcher(stops)
        assert matcher.matched is None
        assert matcher.push("abcd") == (text, True)
        assert matcher.matched == matched


def test_without_stops_nothing_is_held_back() -> None:
    matcher = StopMatcher(["", ""])
    assert matcher.push("all") == ("all", False)
    assert matcher.flush() == ""


def test_memory_grows_with_the_length_of_the_stops_and_not_with_its_square() -> None:
    stops = [f"{n:02}" + "\U0001f600" * 998 for n in range(16)]
    tracemalloc.start()
    try:
        matcher = StopMatcher(stops)
        assert matcher.push("00" + "\U0001f600" * 500) == ("", False)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()
