"""Parsing arbitrary, hostile and very long output of UI-TARS models."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shared.models.image_geometry import ImageGeometry
from web.parsing.ui_tars import parse
from web.parsing.ui_tars_calls import ActionName

GEOMETRY = ImageGeometry(28, 100 * 28 * 28, 16384 * 28 * 28)
SIZE = (1120, 560)
LONG = 1_000_000
"""Characters. Parsing in quadratic time would not end."""

FRAGMENTS = [
    *[f"{name}(" for name in (*ActionName, "fly")],
    "Action:", "Action\uff1a", "Thought:", "Action_Summary:", "Reflection:", "start_box=", "content=", "key=",
    "direction=", "'", '"', "\\", ")", "(", "[", "]", ",", "\n", " ", ";", "up", "(1,2)", "<point>1 2</point>",
    "-1.5", "x", "\ud800",
]  # fmt: skip
TEXTS = st.one_of(st.text(), st.lists(st.sampled_from(FRAGMENTS), max_size=40).map("".join))
IMAGES = st.none() | st.tuples(st.integers(0, 5000), st.integers(0, 5000))


@given(TEXTS, IMAGES, st.sampled_from([None, GEOMETRY]))
@example("Action: fly\u2028()", None, None)
@example("click(start_box='\n\u2028\x85')", None, None)
def test_any_text_gives_either_actions_or_a_reason_of_one_line(
    text: str, size: tuple[int, int] | None, geometry: ImageGeometry | None
) -> None:
    parsed, reason = parse(text, size, geometry)
    assert bool(parsed) == (reason is None)
    assert reason is None or (len(reason.splitlines()) == 1 and len(reason) < 500)
    assert all(each.raw in text and each.raw.startswith(f"{each.action}(") for each in parsed)


REPEATED = [
    "'", "' ", "')", "')x", "', )x", "\\", "\\'", "', a=", ",", "a=b,", "a='', ", " ", "\n", "\n ", ";", "(",
    "a", "a(", "1", "1 ", "<point>", "<|box_start|>", "Action:", "Action: ", "Action:\n", "\nAction:",
    "\nAction:a", "Action: type(content='", "\nAction: type(content='')x", "wait()\n\n",
    "\nAction: wait() \nThought: a", "type(content='', )b", "\nThought", "Thought:", "Action_Summary",
    "Reflection:",
]  # fmt: skip
BEGINNINGS = [
    "",
    "Action: ",
    "Action: type(content='",
    "Action: type(",
    "Action: click(start_box='",
    "Action: click(start_box=(",
]


@pytest.mark.parametrize("start", BEGINNINGS)
@pytest.mark.parametrize("fragment", REPEATED)
def test_long_texts_are_parsed_in_linear_time(start: str, fragment: str) -> None:
    text = start + fragment * (LONG // 10 // len(fragment))
    for whole in (text, f"{text}\nAction: wait()", f"{text}')"):
        parsed, reason = parse(whole, SIZE, GEOMETRY)
        assert bool(parsed) == (reason is None)
        assert reason is None or len(reason) < 500


def test_long_output_is_parsed_completely() -> None:
    (action,), reason = parse(f"Action: type(content='{'it is ' * LONG}')", SIZE, GEOMETRY)
    assert (action.text, reason) == ("it is " * LONG, None)
    actions, reason = parse("Action: " + "wait()\n\n" * (LONG // 10), SIZE, GEOMETRY)
    assert (len(actions), reason) == (LONG // 10, None)
