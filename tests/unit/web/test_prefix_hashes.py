"""Prefix hashes are equal exactly for prefixes that a worker can reuse."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from shared.jobs.request import Request, Sampling
from web.admission.prefix_hashes import MIN_BYTES, OFFSETS, prefix_hashes

SYSTEM = ("system", "You are a careful librarian. " * 20)
QUESTION = ("user", "Which books of " + "this and that kind " * 20 + "are there?")
ANSWER = ("assistant", "There are many.")
NEXT = ("user", "And of others?")


def make_request(*turns: tuple[str, str], prompt: str | None = None, model: str = "m", share: bool = False) -> Request:
    messages = tuple({"role": role, "content": content} for role, content in turns) or None
    return Request(model, 8, Sampling(0.0), prompt=prompt, messages=messages, share_system_prompt=share)


def hashes(*turns: tuple[str, str], owner: str = "a", **more: Any) -> tuple[str, ...]:
    return prefix_hashes(make_request(*turns, **more), owner)


def test_a_continued_conversation_has_the_hash_of_the_previous_one() -> None:
    conversation = [SYSTEM, QUESTION]
    for _ in range(5):
        previous, *_ = hashes(*conversation)
        continued = hashes(*conversation, ANSWER, NEXT)
        assert previous in continued and continued[0] != previous
        assert hashes(*conversation, ANSWER, QUESTION)[1] == continued[1], "only the last message differs"
        conversation += [ANSWER, NEXT]


def test_conversations_share_only_the_hash_of_their_system_message() -> None:
    one, other = hashes(SYSTEM, QUESTION), hashes(SYSTEM, ("user", "Something else. " * 30))
    assert set(one) & set(other) == {one[-1]} == {*hashes(SYSTEM)}


def test_api_keys_share_no_hashes() -> None:
    conversation = (SYSTEM, QUESTION, ANSWER, NEXT)
    assert not {*hashes(*conversation)} & {*hashes(*conversation, owner="b")}
    assert not {*hashes(prompt="x" * 5000)} & {*hashes(prompt="x" * 5000, owner="b")}


def test_a_shared_system_message_has_the_same_hash_for_all_keys_that_share_it() -> None:
    one, other = hashes(SYSTEM, QUESTION, share=True), hashes(SYSTEM, QUESTION, owner="b", share=True)
    assert set(one) & set(other) == {one[-1]}
    assert one[-1] not in hashes(SYSTEM, QUESTION), "a private system message has another hash"


def test_tools_and_template_variables_precede_the_messages() -> None:
    request = make_request(SYSTEM, QUESTION)
    variants = [
        request,
        replace(request, tools=({"type": "function", "function": {"name": "add"}},)),
        replace(request, template_variables={"enable_thinking": False}),
    ]
    first, *others = [set(prefix_hashes(variant, "a")) for variant in variants]
    assert all(hashes.isdisjoint(first) for hashes in others)


def test_tool_calls_are_a_part_of_their_message() -> None:
    def with_arguments(arguments: str) -> tuple[str, ...]:
        call = {"id": "c", "type": "function", "function": {"name": "add", "arguments": arguments}}
        messages = (
            {"role": "user", "content": "x" * 400},
            {"role": "assistant", "content": None, "tool_calls": [call]},
        )
        return prefix_hashes(Request("m", 8, Sampling(0.0), messages=messages), "a")

    one, other = with_arguments("{}"), with_arguments('{"a": 1}')
    assert one[0] != other[0] and one[1:] == other[1:]


def test_token_ids_are_hashed_in_place_of_a_text() -> None:
    request = Request("m", 8, Sampling(0.0))
    one, other = (set(prefix_hashes(request, "a", [*range(2000), last])) for last in (1, 2))
    assert one & other and one != other


def test_models_share_no_hashes() -> None:
    assert not {*hashes(SYSTEM, QUESTION)} & {*hashes(SYSTEM, QUESTION, model="n")}


@pytest.mark.parametrize("raw", [True, False])
def test_a_document_with_different_questions_has_common_hashes(raw: bool) -> None:
    text = "".join(f"{n}. Call me Ishmael. " for n in range(1000))

    def with_question(question: str) -> tuple[str, ...]:
        return hashes(prompt=text + question) if raw else hashes(("user", text + question))

    one, other = with_question("Who speaks?"), with_question("Where?")
    assert len(one) == len(OFFSETS) + 1
    assert one[0] != other[0] and one[1:] == other[1:]
    shorter = hashes(prompt=text[:5000]) if raw else hashes(("user", text[:5000]))
    assert shorter[1:] == one[2:], "a shorter document has the hashes before its end"


def test_short_prefixes_have_no_hashes() -> None:
    assert hashes(prompt="x" * (MIN_BYTES - 1)) == ()
    assert len(hashes(prompt="x" * MIN_BYTES)) == 1
    assert hashes(("user", "Hi"), ("assistant", "Hello."), ("user", "Bye")) == ()
    assert len(hashes(("system", "Be brief."), QUESTION)) == 1, (
        "the system message is too short, but not together with the question"
    )


def test_there_are_at_most_five_hashes() -> None:
    conversation = [SYSTEM, QUESTION] + [ANSWER, NEXT] * 500
    for turns in (conversation[:1], conversation[:2], conversation[:3], conversation):
        found = hashes(*turns)
        assert len(set(found)) == len(found) <= 5
        assert all(len(each) == 16 and int(each, 16) >= 0 for each in found)
