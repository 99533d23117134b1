"""Answers of UI-TARS in the published format, and all others."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.image_geometry import ImageGeometry
from web.ui_tars import Action, Point, parse

GEOMETRY = ImageGeometry(28, 3136, 12845056)
SCREEN = (1920, 1080)
"""The model sees 1932 x 1092 of it."""


def place(x: float, y: float) -> Point:
    return Point(round(x * 1920 / 1932, 1), round(y * 1080 / 1092, 1), inside=True)


def one(text: str) -> Action:
    actions, fault = parse(text, SCREEN, GEOMETRY)
    assert fault is None
    (action,) = actions
    return action


@pytest.mark.parametrize(
    ("call", "means"),
    [
        ("click(start_box='(197,525)')", {"action": "click", "start": place(197, 525)}),
        ("click(start_box='<|box_start|>(197,525)<|box_end|>')", {"action": "click", "start": place(197, 525)}),
        ('click(start_box="(197, 525)")', {"action": "click", "start": place(197, 525)}),
        ("click(start_box='[190, 520, 204, 530]')", {"action": "click", "start": place(197, 525)}),
        ("click(start_box='<bbox>190 520 204 530</bbox>')", {"action": "click", "start": place(197, 525)}),
        ("click(point='<point>197 525</point>')", {"action": "click", "start": place(197, 525)}),
        ("left_double(start_box='(10,20)')", {"action": "left_double", "start": place(10, 20)}),
        ("right_single(start_box='(10,20)')", {"action": "right_single", "start": place(10, 20)}),
        (
            "drag(start_box='(10,20)', end_box='(300,400)')",
            {"action": "drag", "start": place(10, 20), "end": place(300, 400)},
        ),
        (
            "drag(start_point='<point>10 20</point>', end_point='<point>300 400</point>')",
            {"action": "drag", "start": place(10, 20), "end": place(300, 400)},
        ),
        ("hotkey(key='ctrl c')", {"action": "hotkey", "key": "ctrl c"}),
        ("type(content='hello world')", {"action": "type", "text": "hello world"}),
        (r"type(content='it\'s \"new\"\n')", {"action": "type", "text": 'it\'s "new"\n'}),
        ("type(content='it's fine (really), or so')", {"action": "type", "text": "it's fine (really), or so"}),
        (r"type(content='C:\\temp')", {"action": "type", "text": r"C:\temp"}),
        (
            "scroll(start_box='(10,20)', direction='down')",
            {"action": "scroll", "start": place(10, 20), "direction": "down"},
        ),
        ("scroll(direction='up')", {"action": "scroll", "direction": "up"}),
        ("wait()", {"action": "wait"}),
        ("finished()", {"action": "finished"}),
        ("finished(content='All done.')", {"action": "finished", "text": "All done."}),
        ("call_user()", {"action": "call_user"}),
    ],
)
def test_the_published_actions(call: str, means: dict[str, Any]) -> None:
    assert one(f"Thought: I see it.\nAction: {call}") == Action(raw=call, thought="I see it.", **means)
    assert one(call) == Action(raw=call, **means)


def test_several_actions_follow_one_another() -> None:
    text = "Thought: Fill it in.\nAction: click(start_box='(10,20)')\n\ntype(content='Ada\\n')\n\nwait()"
    actions, fault = parse(text, SCREEN, GEOMETRY)
    assert fault is None
    assert [action.action for action in actions] == ["click", "type", "wait"]
    assert {action.thought for action in actions} == {"Fill it in."}
    assert actions[1].raw == "type(content='Ada\\n')"


@pytest.mark.parametrize(
    ("head", "thought"),
    [
        ("Thought: a\nb (c=1)\nAction: ", "a\nb (c=1)"), ("Thought:我看到了\nAction:", "我看到了"),
        ("Reflection: r\nAction_Summary: s\nAction: ", "r\ns"), ("Action: ", None), ("", None),
    ],
)  # fmt: skip
def test_what_was_thought(head: str, thought: str | None) -> None:
    assert one(f"{head}wait()").thought == thought


def test_a_place_outside_is_told_as_it_was_said() -> None:
    start = one("click(start_box='(2500,-3)')").start
    assert start is not None
    assert not start.inside
    assert start.x > 1920
    assert start.y < 0


def test_without_an_image_no_place_is_told() -> None:
    for size, geometry in ((None, GEOMETRY), (SCREEN, None)):
        actions, fault = parse("click(start_box='(1,2)')", size, geometry)
        assert fault is None
        assert actions == [Action("click", "click(start_box='(1,2)')")]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("I do not know.", "the text has no action"),
        ("", "the text has no action"),
        ("Action: fly(start_box='(1,2)')", "fly is no action"),
        ("click()", "click lacks its start"),
        ("drag(start_box='(1,2)')", "drag lacks its end"),
        ("type()", "type lacks its content"),
        ("hotkey()", "hotkey lacks its key"),
        ("click(start_box='(1,2,3)')", "click has a place of 3 numbers"),
        ("click(start_box='here')", "click has a place of 0 numbers"),
        ("scroll(direction='sideways')", "scroll has a direction that is none"),
        ("click(start_box=(1,2))", "an argument of click is not in quotes"),
        ("click(1, 2)", "the arguments of click cannot be read"),
        ("type(content='never ends", "an argument of type does not end"),
        ("click(", "the arguments of click cannot be read"),
    ],
)
def test_what_is_no_action_says_why(text: str, fault: str) -> None:
    assert parse(text, SCREEN, GEOMETRY) == ([], fault)


def test_what_was_understood_before_a_fault_stays() -> None:
    actions, fault = parse("wait()\nfly()", SCREEN, GEOMETRY)
    assert [action.action for action in actions] == ["wait"]
    assert fault == "fly is no action"


@given(st.text(), st.tuples(st.integers(1, 10_000), st.integers(1, 10_000)) | st.none())
def test_any_text_has_an_answer(text: str, size: tuple[int, int] | None) -> None:
    actions, fault = parse(text, size, GEOMETRY)
    assert actions or fault


_CALL_LIKE = st.lists(
    st.sampled_from(["click(", "type(", "start_box=", "content=", "'", '"', ")", "(1,2)", "\\", ",", " ", "Action:"])
)


@given(_CALL_LIKE)
def test_any_heap_of_pieces_has_an_answer(pieces: list[str]) -> None:
    actions, fault = parse("".join(pieces), SCREEN, GEOMETRY)
    assert actions or fault


@pytest.mark.parametrize("piece", ["click(", "'", "a=", "Action:", "(", "type(content='", " ", "\\'", "wait()"])
def test_long_texts_take_no_longer_than_long_texts(piece: str) -> None:
    parse(piece * 100_000, SCREEN, GEOMETRY)
