"""Parsing the output of UI-TARS models into actions."""

import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.jobs.record import Parsing
from shared.models.image_geometry import Coordinates, ImageGeometry
from shared.models.registry import ModelCard
from web.parsing import ui_tars
from web.parsing.actions import Action, ActionName, ParseError
from web.parsing.coordinates import Point, Scale
from web.parsing.parse import parse
from web.parsing.ui_tars_calls import UI_TARS

GEOMETRY = ImageGeometry(28, 100 * 28 * 28, 16384 * 28 * 28)
SIZE = (1120, 560)
"""Multiples of 28, so the model sees this image in its own size."""


def scale_of(size: tuple[int, int] | None, geometry: ImageGeometry | None = GEOMETRY) -> Scale:
    return Scale.of(size, geometry, Coordinates.PIXELS)


def actions(text: str, size: tuple[int, int] = SIZE) -> list[Action]:
    return ui_tars.parse(text, scale_of(size))


def single(text: str) -> Action:
    (action,) = actions(text)
    return action


def parse_error(text: str) -> str:
    with pytest.raises(ParseError) as error:
        actions(text)
    return str(error.value)


def at(x: float, y: float) -> Point:
    return Point(x, y, inside=True)


def action_of(name: ActionName, raw: str, **fields: object) -> Action:
    return Action(action=name, raw=raw, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("call", "name", "fields"),
    [
        ("click(start_box='(197,525)')", ActionName.CLICK, {"start": at(197, 525)}),
        ("click(start_box='<|box_start|>(197,525)<|box_end|>')", ActionName.CLICK, {"start": at(197, 525)}),
        ("left_double(start_box='<|box_start|>(1,2)<|box_end|>')", ActionName.LEFT_DOUBLE, {"start": at(1, 2)}),
        ("right_single(start_box='(1, 2)')", ActionName.RIGHT_SINGLE, {"start": at(1, 2)}),
        ("click(start_box='(10,20,30,50)')", ActionName.CLICK, {"start": at(20, 35)}),
        ("click(start_box='[10, 20, 31, 50]')", ActionName.CLICK, {"start": at(20.5, 35)}),
        ("click(start_box='(10,20),(30,50)')", ActionName.CLICK, {"start": at(20, 35)}),
        ("click(start_box='<bbox>637 464 637 464</bbox>')", ActionName.CLICK, {"start": at(637, 464)}),
        ("click(start_box='<bbox>300 400</bbox>')", ActionName.CLICK, {"start": at(300, 400)}),
        ("click(point='<point>510 150</point>')", ActionName.CLICK, {"start": at(510, 150)}),
        ('click(start_box="(100,200)")', ActionName.CLICK, {"start": at(100, 200)}),
        ("click(start_box=(100, 200))", ActionName.CLICK, {"start": at(100, 200)}),
        ("click(start_box='(100.25,200.5)')", ActionName.CLICK, {"start": at(100.2, 200.5)}),
        (
            "drag(start_box='<|box_start|>(1,2)<|box_end|>', end_box='<|box_start|>(3,4)<|box_end|>')",
            ActionName.DRAG,
            {"start": at(1, 2), "end": at(3, 4)},
        ),
        (
            "drag(start_point='<point>458 328</point>', end_point='<point>350 309</point>')",
            ActionName.DRAG,
            {"start": at(458, 328), "end": at(350, 309)},
        ),
        ("hotkey(key='ctrl c')", ActionName.HOTKEY, {"key": "ctrl c"}),
        ("type(content='xxx')", ActionName.TYPE, {"text": "xxx"}),
        (r"type(content='doubao.com\n')", ActionName.TYPE, {"text": "doubao.com\n"}),
        ("type(content='')", ActionName.TYPE, {"text": ""}),
        ("type(text='Hello', start_box='(300,400)')", ActionName.TYPE, {"text": "Hello"}),
        ("scroll(direction='up')", ActionName.SCROLL, {"direction": "up"}),
        ("scroll(start_box='(1,2)', direction='down')", ActionName.SCROLL, {"start": at(1, 2), "direction": "down"}),
        (
            "scroll(direction='left', point='<point>1 2</point>')",
            ActionName.SCROLL,
            {"start": at(1, 2), "direction": "left"},
        ),
        ("wait()", ActionName.WAIT, {}),
        ("wait(time=3)", ActionName.WAIT, {"time": "3"}),
        ("move_to(point='<point>1 2</point>')", ActionName.MOVE_TO, {"start": at(1, 2)}),
        (
            "mouse_down(point='<point>1 2</point>', button='right')",
            ActionName.MOUSE_DOWN,
            {"start": at(1, 2), "button": "right"},
        ),
        ("mouse_up()", ActionName.MOUSE_UP, {}),
        ("press(key='shift')", ActionName.PRESS, {"key": "shift"}),
        ("release(key='shift')", ActionName.RELEASE, {"key": "shift"}),
        ("take_screenshot()", ActionName.TAKE_SCREENSHOT, {}),
        ("open_computer()", ActionName.OPEN_COMPUTER, {}),
        ("call_user(content='Which?')", ActionName.CALL_USER, {"text": "Which?"}),
        ("finished()", ActionName.FINISHED, {}),
        (r"finished(content='It\'s \"done\".')", ActionName.FINISHED, {"text": 'It\'s "done".'}),
        ("call_user()", ActionName.CALL_USER, {}),
        ("long_press(start_box='<|box_start|>(1,2)<|box_end|>')", ActionName.LONG_PRESS, {"start": at(1, 2)}),
        ("long_press(start_box='(1,2)', time='')", ActionName.LONG_PRESS, {"start": at(1, 2)}),
        ("long_press(start_box='(1,2)', time='2')", ActionName.LONG_PRESS, {"start": at(1, 2), "time": "2"}),
        ("long_press(point='<point>1 2</point>', time=1.5)", ActionName.LONG_PRESS, {"start": at(1, 2), "time": "1.5"}),
        ("open_app(app_name='Clock')", ActionName.OPEN_APP, {"app": "Clock"}),
        (r"open_app(app_name='Carl\'s \"To do\"')", ActionName.OPEN_APP, {"app": 'Carl\'s "To do"'}),
        ("press_home()", ActionName.PRESS_HOME, {}),
        ("press_back()", ActionName.PRESS_BACK, {}),
        ("press_enter()", ActionName.PRESS_ENTER, {}),
        ("swipe(start_box='(1,9)', end_box='(1,2)')", ActionName.SWIPE, {"start": at(1, 9), "end": at(1, 2)}),
        ("scroll(start_box='(1,9)', end_box='(1,2)')", ActionName.SCROLL, {"start": at(1, 9), "end": at(1, 2)}),
        (
            "scroll(start_box='(1,9)', end_box='(1,2)', direction='up')",
            ActionName.SCROLL,
            {"start": at(1, 9), "direction": "up"},
        ),
    ],
)
@pytest.mark.parametrize("thought", [None, "Here it is."])
def test_every_documented_form(call: str, name: ActionName, fields: dict[str, object], thought: str | None) -> None:
    text = f"Thought: {thought}\nAction: {call}" if thought else call
    assert single(text) == action_of(name, call, thought=thought, **fields)


@pytest.mark.parametrize(
    ("text", "thought"),
    [
        ("Thought: One.\nAction: wait()", "One."),
        ("Thought：好。\nAction：wait()", "好。"),  # noqa: RUF001
        ("  Thought: One,\n\ntwo.  \n\n  Action:wait()  ", "One,\n\ntwo."),
        ("Thought: One. Action: wait()", "One."),
        ("Action_Summary: Sum.\nAction: wait()", "Sum."),
        ("Reflection: Hm.\nAction_Summary: Sum.\nAction: wait()", "Sum."),
        ("Reflection: Hm.\nThought: One.\nAction: wait()", "One."),
        ("Reflection: Hm.\nAction: wait()", "Hm."),
        ("<think>\nOkay, wait() first.\n</think>\nThought: One.\nAction: wait()", "One."),
        ("1. The field is active.  \n2. Type.\n\nAction: wait()", "1. The field is active.  \n2. Type."),
        (
            "Thought: Open users' settings: \"Action: click(it)\nAction: wait()",
            "Open users' settings: \"Action: click(it)",
        ),
        ("Thought: \nAction: wait()", None),
        ("Action: wait()", None),
        ("\r\nThought: One.\r\nAction: wait()\r\n", "One."),
    ],
)
def test_the_thought_before_an_action(text: str, thought: str | None) -> None:
    assert single(text) == action_of(ActionName.WAIT, "wait()", thought=thought)


@pytest.mark.parametrize(
    "between",
    ["\n\n", "\n", "\r\n\r\n", "\nAction: ", "\n\nAction：", "; ", " ", " Action: "],  # noqa: RUF001
)
def test_several_actions_after_one_thought(between: str) -> None:
    text = between.join(["Thought: All.\nAction: click(start_box='(1,2)')", "type(content='a b')", "wait()"])
    assert actions(text) == [
        action_of(ActionName.CLICK, "click(start_box='(1,2)')", thought="All.", start=at(1, 2)),
        action_of(ActionName.TYPE, "type(content='a b')", thought="All.", text="a b"),
        action_of(ActionName.WAIT, "wait()", thought="All."),
    ]


def test_each_action_has_the_thought_before_it() -> None:
    text = "Thought: One.\nAction: wait()\nThought: Two.\nAction: call_user()\nSo:\nAction: finished()"
    assert [(each.thought, each.action) for each in actions(text)] == [
        ("One.", "wait"),
        ("Two.", "call_user"),
        ("Two.", "finished"),
    ]


@pytest.mark.parametrize(
    "after", [" then wait()", "\n</Output>", "<|im_end|>", "\n```", "\n\nThat (I hope) does it.", ")"]
)
def test_other_words_after_a_call_are_ignored(after: str) -> None:
    assert single(f"Action: click(start_box='(1,2)'){after}").raw == "click(start_box='(1,2)')"


@pytest.mark.parametrize(
    ("written", "typed"),
    [
        (r"it\'s", "it's"),
        ("it's", "it's"),
        ("a 'quoted' word", "a 'quoted' word"),
        ("'", "'"),
        (r"say \"yes\"", 'say "yes"'),
        ('say "yes"', 'say "yes"'),
        (r"two\nlines\n", "two\nlines\n"),
        ("two\nlines", "two\nlines"),
        (r"a \\n is no line", r"a \n is no line"),
        (r"C:\temp", r"C:\temp"),
        ("Action: wait()", "Action: wait()"),
        ("one\nAction: wait()\ntwo", "one\nAction: wait()\ntwo"),
        ("f(x), g(y)", "f(x), g(y)"),
        ("print('hello')", "print('hello')"),
        ("print('a', end='')", "print('a', end='')"),
        ("(a 'test') of it", "(a 'test') of it"),
        ("=, key=", "=, key="),
        ("天气", "天气"),
    ],
)
@pytest.mark.parametrize("rest", ["", "\n\nhotkey(key='enter')"])
def test_quotes_and_escapes_in_typed_text(written: str, typed: str, rest: str) -> None:
    first, *others = actions(f"Thought: Type.\nAction: type(content='{written}'){rest}")
    assert first.text == typed
    assert [each.key for each in others] == (["enter"] if rest else [])


@given(st.text(), st.sampled_from("'\""))
def test_escaped_text_is_typed_unchanged(typed: str, quote: str) -> None:
    written = re.sub(r"[\\'\"]", r"\\\g<0>", typed).replace("\n", r"\n")
    assert single(f"Action: type(content={quote}{written}{quote})").text == typed


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no action"),
        ("I should wait() until the page is stable.", "no action"),
        ("Thought: No more.", "no action"),
        ("Action: click the button", "no action"),
        ("Action:", "no action"),
        ("fly(to='(1,2)')", "'fly'"),
        ("Action: wait()\n\nfly(to='(1,2)')", "'fly'"),
        ("Action: click()", "click needs the argument start_box"),
        ("Action: click(end_box='(1,2)')", "click needs the argument start_box"),
        ("Action: drag(start_box='(1,2)')", "drag needs the argument end_box"),
        ("Action: hotkey()", "hotkey needs the argument key"),
        ("Action: hotkey(key=' ')", "key of hotkey is empty"),
        ("Action: open_app()", "open_app needs the argument app_name"),
        ("Action: open_app(app_name='')", "app_name of open_app is empty"),
        ("Action: long_press(time='2')", "long_press needs the argument start_box"),
        ("Action: scroll(end_box='(1,2)')", "scroll needs the argument start_box"),
        ("Action: type()", "type needs the argument content"),
        ("Action: scroll(start_box='(1,2)')", "scroll needs the argument direction"),
        ("Action: scroll(start_box='(1,2)', direction='in')", "Unknown direction of scroll: 'in'"),
        ("Action: click(start_box='')", "start_box of click is neither a point nor a box: ''"),
        ("Action: click(start_box='[]')", "neither a point nor a box"),
        ("Action: click(start_box='(1)')", "neither a point nor a box"),
        ("Action: click(start_box='(1,2,3)')", "neither a point nor a box"),
        ("Action: click(start_box='(1,2,3,4,5)')", "neither a point nor a box"),
        ("Action: click(start_box='(x,y)')", "neither a point nor a box"),
        ("Action: click(start_box='(1e9,nan)')", "neither a point nor a box"),
        (f"Action: click(start_box='({'9' * 400},1)')", "neither a point nor a box"),
        ("Action: click(start_box='(１,２)')", "neither a point nor a box"),  # noqa: RUF001
        ("Action: drag(start_box='(1,2)', end_box='here')", "end_box of drag is neither"),
        ("Action: click('(1,2)')", "arguments of click are malformed"),
        ("Action: click(start_box=", "arguments of click are malformed or incomplete"),
        ("Action: click(start_box='(1,2)'", "string in click is not closed"),
        ("Action: type(content='and so", "string in type is not closed"),
        ("Action: __import__('os').system('true')", "'__import__'"),
    ],
)
def test_invalid_output_gives_a_reason(text: str, reason: str) -> None:
    assert reason in parse_error(text)


def test_one_invalid_action_invalidates_all() -> None:
    assert "'fly'" in parse_error("Action: click(start_box='(1,2)')\n\nfly()\n\nwait()")


@pytest.mark.parametrize(
    ("size", "written", "point"),
    [
        ((1920, 1080), (197, 525), Point(195.8, 519.2, inside=True)),  # the model sees 1932 x 1092
        ((1920, 1080), (1931, 1091), Point(1919.0, 1079.0, inside=True)),
        ((1920, 1080), (1932, 1091), Point(1920.0, 1079.0, inside=False)),
        ((1920, 1080), (0, 0), Point(0.0, 0.0, inside=True)),
        ((1920, 1080), (-1, 5), Point(-1.0, 4.9, inside=False)),
        ((1920, 1080), (5, 1092), Point(5.0, 1080.0, inside=False)),
        ((14, 28), (112, 112), Point(7.0, 7.5, inside=True)),  # the model sees 224 x 420: small images are enlarged
        ((7168, 7168), (1778, 3555), Point(3556.0, 7110.0, inside=True)),  # the model sees 3584 x 3584
    ],
)
def test_coordinates_are_converted_to_the_image_that_was_sent(
    size: tuple[int, int], written: tuple[int, int], point: Point
) -> None:
    (action,) = actions(f"click(start_box='({written[0]},{written[1]})')", size)
    assert action.start == point


@given(st.integers(20, 6000), st.integers(20, 6000), st.floats(0, 1), st.floats(0, 1))
def test_converting_coordinates_there_and_back(width: int, height: int, right: float, down: float) -> None:
    size = (width, height)
    x, y = int(right * (width - 1)), int(down * (height - 1))
    try:
        seen = GEOMETRY.resized(*size)
    except ValueError:
        return
    written = (round(x * seen[0] / width, 3), round(y * seen[1] / height, 3))
    (action,) = actions(f"drag(start_box='({written[0]},{written[1]})', end_box='{[*written, *written]}')", size)
    assert action.start == action.end == at(pytest.approx(x, abs=0.11), pytest.approx(y, abs=0.11))


def test_negative_zero_becomes_zero() -> None:
    start = single("click(start_box='(-0.001,-0)')").start
    assert repr(start) == "Point(x=0.0, y=0.0, inside=True)"


def test_without_a_geometry_coordinates_are_not_converted() -> None:
    scale = scale_of((1920, 1080), None)
    assert (scale.point(197, 1079), scale.point(197, 1080)) == (at(197, 1079), Point(197, 1080, inside=False))


def test_version_1_0_writes_thousandths() -> None:
    scale = Scale.of((1920, 1080), GEOMETRY, Coordinates.of("qwen2_vl"))
    (action,) = ui_tars.parse("Action: click(start_box='(500,250)')", scale)
    assert action.start == at(960, 270)


@pytest.mark.parametrize("geometry", [None, GEOMETRY])
def test_without_an_image_no_point_is_inside(geometry: ImageGeometry | None) -> None:
    assert scale_of(None, geometry).point(1, 2) == Point(1, 2, inside=False)


@pytest.mark.parametrize("size", [(1, 201), (0, 0)])
def test_an_image_of_an_unsupported_shape_gives_a_reason(size: tuple[int, int]) -> None:
    card = ModelCard("a", "vision", 512, image=asdict(GEOMETRY))
    parsed, reason = parse("click(start_box='(1,2)')", Parsing("ui_tars", size), card)
    assert parsed == [] and reason is not None and f"{size[0]} x {size[1]} pixels" in reason


def documented_actions() -> set[str]:
    """Return the actions of UI-TARS that docs/images.md lists."""
    (row,) = re.findall(r"^\| UI-TARS \|(.*)\|$", Path("docs/images.md").read_text(), re.MULTILINE)
    return set(re.findall("`([a-z_]+)`", row))


def test_every_action_is_documented_and_tested() -> None:
    (forms,) = [mark for mark in test_every_documented_form.pytestmark if "call" in mark.args[0]]
    assert {name for _, name, _ in forms.args[1]} == set(UI_TARS) == documented_actions()


def test_coordinates_on_phones_are_converted_to_the_image_that_was_sent() -> None:
    pressed, swiped = actions(
        "long_press(start_box='(504,1120)')\nscroll(start_box='(504,1120)', end_box='(0,0)')", (1080, 2400)
    )
    assert pressed.start == swiped.start != at(504, 1120) and swiped.end == at(0, 0)


def test_the_parser_does_not_import_mlx() -> None:
    code = (
        "import sys, web.parsing.parse\n"
        "sys.exit(any(name.split('.')[0] in {'mlx', 'mlx_lm', 'mlx_vlm', 'worker'} for name in sys.modules))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
