"""Marks: the same for beginnings that workers keep one prefix of, and for no others."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from shared.jobs.request import Request, Sampling
from web.admission.prefix_hashes import CUTS, LEAST, prefix_hashes

SYSTEM = ("system", "You are a careful librarian. " * 20)
QUESTION = ("user", "Which books of " + "this and that kind " * 20 + "are there?")
ANSWER = ("assistant", "There are many.")
NEXT = ("user", "And of others?")


def asked(*said: tuple[str, str], prompt: str | None = None, model: str = "m", share: bool = False) -> Request:
    messages = tuple({"role": role, "content": content} for role, content in said) or None
    return Request(model, 8, Sampling(0.0), prompt=prompt, messages=messages, share_system_prompt=share)


def of(*said: tuple[str, str], owner: str = "a", **more: Any) -> tuple[str, ...]:
    return prefix_hashes(asked(*said, **more), owner)


def test_a_conversation_that_goes_on_has_the_mark_of_all_that_was_said_before() -> None:
    turn = [SYSTEM, QUESTION]
    for _ in range(5):
        whole, *_ = of(*turn)
        goes_on = of(*turn, ANSWER, NEXT)
        assert whole in goes_on and goes_on[0] != whole
        assert of(*turn, ANSWER, QUESTION)[1] == goes_on[1], "the last question, asked in another way"
        turn += [ANSWER, NEXT]


def test_conversations_have_the_mark_of_their_system_message_and_no_other_in_common() -> None:
    one, other = of(SYSTEM, QUESTION), of(SYSTEM, ("user", "Something else. " * 30))
    assert set(one) & set(other) == {one[-1]} == {*of(SYSTEM)}


def test_keys_have_no_mark_in_common() -> None:
    said = (SYSTEM, QUESTION, ANSWER, NEXT)
    assert not {*of(*said)} & {*of(*said, owner="b")}
    assert not {*of(prompt="x" * 5000)} & {*of(prompt="x" * 5000, owner="b")}


def test_a_system_message_that_is_shared_has_the_same_mark_for_all_who_share_it_and_nothing_behind_it() -> None:
    one, other = of(SYSTEM, QUESTION, share=True), of(SYSTEM, QUESTION, owner="b", share=True)
    assert set(one) & set(other) == {one[-1]}
    assert one[-1] not in of(SYSTEM, QUESTION), "what is private has a mark of its own"


def test_models_have_no_mark_in_common() -> None:
    assert not {*of(SYSTEM, QUESTION)} & {*of(SYSTEM, QUESTION, model="n")}


@pytest.mark.parametrize("raw", [True, False])
def test_a_text_with_another_question_behind_it_has_the_marks_of_what_is_the_same(raw: bool) -> None:
    text = "".join(f"{n}. Call me Ishmael. " for n in range(1000))

    def about(question: str) -> tuple[str, ...]:
        return of(prompt=text + question) if raw else of(("user", text + question))

    one, other = about("Who speaks?"), about("Where?")
    assert len(one) == len(CUTS) + 1
    assert one[0] != other[0] and one[1:] == other[1:]
    behind = of(prompt=text[:5000]) if raw else of(("user", text[:5000]))
    assert behind[1:] == one[2:], "of a text that ends earlier, the cuts before its end"


def test_what_is_read_again_in_no_time_has_no_marks() -> None:
    assert of(prompt="x" * (LEAST - 1)) == ()
    assert len(of(prompt="x" * LEAST)) == 1
    assert of(("user", "Hi"), ("assistant", "Hello."), ("user", "Bye")) == ()
    assert len(of(("system", "Be brief."), QUESTION)) == 1, "too short alone, and long enough with the question"


def test_marks_are_few_and_tell_nothing() -> None:
    turn = [SYSTEM, QUESTION] + [ANSWER, NEXT] * 500
    for said in (turn[:1], turn[:2], turn[:3], turn):
        found = of(*said)
        assert len(set(found)) == len(found) <= 5
        assert all(len(mark) == 16 and int(mark, 16) >= 0 for mark in found)
    assert all(a != b for a, b in pairwise(of(*turn)))
