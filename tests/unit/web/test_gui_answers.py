"""Parsing answers of UI-TARS 2 and of Qwen's GUI models: tags, tool calls, and points and boxes in JSON."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shared.jobs.record import Parsing
from shared.models.registry import ModelCard
from web.parsing.actions import Action, ActionName
from web.parsing.computer_use import FUNCTIONS
from web.parsing.coordinates import Box, Point
from web.parsing.grounding import Region
from web.parsing.parse import parse

SIZE = (2000, 500)
QWEN_2_5 = ModelCard("a", "vision", 512, image={"factor": 28, "min_pixels": 4 * 28 * 28, "max_pixels": 16384 * 28 * 28})
QWEN_3 = ModelCard("a", "vision", 512, coordinates="thousandths")


def results(format_: str, text: str, card: ModelCard = QWEN_3) -> list[Any]:
    parsed, reason = parse(text, Parsing(format_, SIZE), card)
    assert reason is None, reason
    return parsed


def parse_error(format_: str, text: str) -> str:
    parsed, reason = parse(text, Parsing(format_, SIZE), QWEN_3)
    assert parsed == [] and reason is not None
    return reason


def at(x: float, y: float, *, inside: bool = True) -> Point:
    return Point(x, y, inside)


def tool_call(name: str, **arguments: object) -> str:
    return json.dumps({"name": name, "arguments": arguments})


COMPUTER: list[tuple[dict[str, object], dict[str, object]]] = [
    ({"action": "key", "keys": ["ctrl", "c"]}, {"key": "ctrl c"}),
    ({"action": "key", "keys": [" "]}, {"key": "space"}),
    ({"action": "key", "keys": "ctrl+shift+t"}, {"key": "ctrl shift t"}),
    ({"action": "key", "keys": "+"}, {"key": "+"}),
    ({"action": "type", "text": "weather\n"}, {"text": "weather\n"}),
    ({"action": "mouse_move", "coordinate": [500, 500]}, {"start": at(1000, 250)}),
    ({"action": "left_click", "coordinate": [1, 2]}, {"start": at(2, 1)}),
    ({"action": "left_click", "coordinate": "(1, 2)"}, {"start": at(2, 1)}),
    ({"action": "left_click", "coordinate": [0, 0, 2, 4]}, {"start": at(2, 1)}),
    ({"action": "left_click"}, {}),
    ({"action": "left_click_drag", "coordinate": [1000, 2]}, {"end": at(2000, 1, inside=False)}),
    ({"action": "right_click", "coordinate": [1, 2]}, {"start": at(2, 1)}),
    ({"action": "middle_click", "coordinate": [1, 2]}, {"start": at(2, 1)}),
    ({"action": "double_click", "coordinate": [1, 2]}, {"start": at(2, 1)}),
    ({"action": "triple_click", "coordinate": [1, 2]}, {"start": at(2, 1)}),
    ({"action": "scroll", "pixels": -300}, {"pixels": -300.0}),
    ({"action": "scroll", "pixels": 5, "coordinate": [1, 2]}, {"pixels": 5.0, "start": at(2, 1)}),
    ({"action": "hscroll", "pixels": 0}, {"pixels": 0.0}),
    ({"action": "wait", "time": 2}, {"time": "2"}),
    ({"action": "terminate", "status": "success"}, {"status": "success"}),
    ({"action": "answer", "text": "42"}, {"text": "42"}),
]
MOBILE: list[tuple[dict[str, object], dict[str, object]]] = [
    ({"action": "key", "text": "volume_up"}, {"key": "volume_up"}),
    ({"action": "click", "coordinate": [1, 2]}, {"start": at(2, 1)}),
    ({"action": "long_press", "coordinate": [1, 2], "time": 1.5}, {"start": at(2, 1), "time": "1.5"}),
    ({"action": "swipe", "coordinate": [1, 2], "coordinate2": [3, 4]}, {"start": at(2, 1), "end": at(6, 2)}),
    ({"action": "type", "text": ""}, {"text": ""}),
    ({"action": "system_button", "button": "Home"}, {"button": "Home"}),
    ({"action": "open", "text": "Clock"}, {"app": "Clock"}),
    ({"action": "wait", "time": "3"}, {"time": "3"}),
    ({"action": "terminate", "status": "failure"}, {"status": "failure"}),
    ({"action": "answer", "text": "It is set."}, {"text": "It is set."}),
]


@pytest.mark.parametrize(
    ("function", "arguments", "fields"),
    [*(("computer_use", *form) for form in COMPUTER), *(("mobile_use", *form) for form in MOBILE)],
)
def test_every_action_of_computer_use_and_mobile_use(
    function: str, arguments: dict[str, Any], fields: dict[str, Any]
) -> None:
    call = tool_call(function, **arguments)
    expected = Action(action=ActionName(arguments["action"]), raw=call, thought="Now.", **fields)
    assert results("computer_use", f"Now.\n<tool_call>\n{call}\n</tool_call>") == [expected]
    values = "".join(
        f"<parameter={name}>\n{value if isinstance(value, str) else json.dumps(value)}\n</parameter>\n"
        for name, value in arguments.items()
    )
    tags = f"<function={function}>\n{values}</function>"
    (tagged,) = results("computer_use", f"<think>\nNow.\n</think>\n\n<tool_call>\n{tags}\n</tool_call>")
    assert tagged == Action(action=ActionName(arguments["action"]), raw=tags, thought="Now.", **fields)


def test_every_known_action_has_a_test_and_documentation() -> None:
    assert set(FUNCTIONS["computer_use"]) == {arguments["action"] for arguments, _ in COMPUTER}
    assert set(FUNCTIONS["mobile_use"]) == {arguments["action"] for arguments, _ in MOBILE}
    text = Path("docs/images.md").read_text()
    for function, known in FUNCTIONS.items():
        *_, row = re.findall(rf"^\| `{function}` \|(.*)\|$", text, re.MULTILINE)
        assert set(re.findall("`([a-z_]+)`", row)) == set(known), function


@pytest.mark.parametrize(
    "text",
    [
        "{call}",
        "```json\n{call}\n```",
        "<tool_call>{call}",  # the end marker is a stop token
        "Thought: Next.\nAction: Click it.\n<tool_call>\n{call}\n</tool_call>",
        "[{call}]",
    ],
)
def test_calls_are_found_in_all_wrappings(text: str) -> None:
    call = tool_call("computer_use", action="left_click", coordinate=[1, 2])
    (action,) = results("computer_use", text.replace("{call}", call))
    assert (action.start, action.raw) == (at(2, 1), call)


def test_arguments_can_be_json_in_a_string_as_in_the_api_of_openai() -> None:
    (action,) = results("computer_use", tool_call("computer_use", action="wait", time=1))
    text = json.dumps({"name": "computer_use", "arguments": json.dumps({"action": "wait", "time": 1})})
    assert results("computer_use", text) == [Action(action=ActionName.WAIT, raw=text, time=action.time)]


def test_each_call_has_the_thought_before_it() -> None:
    calls = [tool_call("computer_use", action="wait", time=number) for number in range(3)]
    text = f"One.\n<tool_call>\n{calls[0]}\n</tool_call>\n<tool_call>\n{calls[1]}\n</tool_call>\nTwo.\n{calls[2]}"
    assert [each.thought for each in results("computer_use", text)] == ["One.", "One.", "Two."]


def test_qwen2_5_vl_writes_pixels_of_the_resized_image() -> None:
    # It sees 1988 x 504 pixels of 2000 x 500.
    text = tool_call("computer_use", action="left_click", coordinate=[994, 252])
    assert results("computer_use", text, QWEN_2_5)[0].start == at(1000, 250)
    (region,) = results("grounding", '{"bbox_2d": [0, 0, 1988, 504], "label": "all"}', QWEN_2_5)
    assert (region.point, region.box) == (at(1000, 250), Box(0, 0, 2000, 500, inside=True))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no call of computer_use"),
        ("I would click the button.", "no call of computer_use"),
        ('{"name": "computer_use"}', "needs a name and arguments"),
        ('{"arguments": {"action": "wait"}}', "needs a name and arguments"),
        ('{"name": "computer_use", "arguments": {"action": "left', "JSON is malformed or incomplete"),
        ('{"name": "computer_use", "arguments": [1]}', "needs a name and arguments"),
        ('{"name": "computer_use", "arguments": "[1]"}', "JSON is not an object"),
        ('{"name": ' * 5_000, "JSON is malformed"),
        (tool_call("shell", action="wait"), "Unknown function 'shell'"),
        (tool_call("computer_use"), "Unknown action of computer_use: 'None'"),
        (tool_call("computer_use", action=["wait"]), "Unknown action of computer_use"),
        (tool_call("computer_use", action="swipe"), "Unknown action of computer_use: 'swipe'"),
        (tool_call("computer_use", action="mouse_move"), "mouse_move needs the argument coordinate"),
        (tool_call("computer_use", action="mouse_move", coordinate=None), "needs the argument coordinate"),
        (tool_call("computer_use", action="mouse_move", coordinate=[1]), "neither a point nor a box: '[1]'"),
        (tool_call("computer_use", action="mouse_move", coordinate=["a", 2]), "neither a point nor a box"),
        (tool_call("computer_use", action="mouse_move", coordinate=[True, 2]), "neither a point nor a box"),
        (tool_call("computer_use", action="mouse_move", coordinate=[float("nan"), 2]), "neither a point nor a box"),
        (tool_call("computer_use", action="mouse_move", coordinate=[10**400, 2]), "neither a point nor a box"),
        (tool_call("computer_use", action="key", keys=[]), "must be a list of keys"),
        (tool_call("computer_use", action="key", keys=[1]), "must be a list of keys"),
        (tool_call("computer_use", action="type", text=1), "text of type is not a text"),
        (tool_call("computer_use", action="scroll", pixels="far"), "pixels of scroll is not a number"),
        (tool_call("computer_use", action="terminate", status="done"), "must be one of failure, success"),
        (tool_call("computer_use", action="terminate", status=["success"]), "must be one of failure, success"),
        (tool_call("mobile_use", action="system_button", button="Power"), "must be one of Back, Enter, Home, Menu"),
        ("<function=computer_use><parameter=action>wait", "argument action of 'computer_use' is incomplete"),
        ("<function=computer_use><parameter=action>wait</parameter>", "arguments of 'computer_use' are malformed"),
    ],
)
def test_invalid_calls_give_a_reason(text: str, reason: str) -> None:
    valid = tool_call("computer_use", action="left_click")
    assert reason in parse_error("computer_use", text)
    if text.startswith("{"):
        assert reason in parse_error("computer_use", f"{valid}\n{text}"), "one invalid call invalidates all"


def tags(function: str, **parameters: str) -> str:
    values = "".join(f"<parameter={name}>{value}</parameter>" for name, value in parameters.items())
    return f"<function={function}>{values}</function>"


@pytest.mark.parametrize(
    ("coordinates", "point"),
    [
        (None, at(1000, 250)),
        ("of_later_versions", at(1000, 250)),
        ("thousandths", at(1000, 250)),
        ("pixels", at(500, 250)),
        ("resized", at(500.0 * 2000 / 1988, 250.0 * 500 / 504)),
    ],
)
def test_the_request_can_say_what_coordinates_refer_to(coordinates: str | None, point: Point) -> None:
    value = 250 if coordinates in ("pixels", "resized") else 500
    card = replace(QWEN_2_5, coordinates="thousandths")
    texts = {
        "grounding": json.dumps({"point_2d": [500, value]}),
        "computer_use": tool_call("computer_use", action="left_click", coordinate=[500, value]),
        "ui_tars": f"<seed:tool_call>{tags('click', point=f'<point>500 {value}</point>')}</seed:tool_call>",
    }
    rounded = Point(round(point.x, 1), round(point.y, 1), inside=True)
    for format_, text in texts.items():
        (found,), reason = parse(text, Parsing(format_, SIZE, coordinates), card)
        assert reason is None
        assert (found.point if format_ == "grounding" else found.start) == rounded


def test_pixels_of_the_resized_image_need_a_model_whose_resizing_is_known() -> None:
    for card in (QWEN_3, None):
        found, reason = parse('{"point": [1, 2]}', Parsing("grounding", SIZE, "resized"), card)
        assert not found and reason is not None and "is unknown" in reason


@pytest.mark.parametrize("marker", ["seed:tool_call", "tool_call"])
def test_ui_tars_2_writes_tags_with_thousandths_whatever_the_model(marker: str) -> None:
    calls = [
        tags("click", point="<point>500 500</point>"),
        tags("drag", start_point="<point>0 0</point>", end_point="<point>1 2</point>"),
        tags("scroll", direction="down"),
        tags("type", content="two\nlines\n"),
        tags("type", content=r"weather\n"),
        tags("finished", content="\nDone.\n"),
        tags("press_back"),
    ]
    text = f"<gui_think> Look. </gui_think>\n<{marker}>{''.join(calls)}</{marker}>"
    fields: list[tuple[str, dict[str, Any]]] = [
        ("click", {"start": at(1000, 250)}),
        ("drag", {"start": at(0, 0), "end": at(2, 1)}),
        ("scroll", {"direction": "down"}),
        ("type", {"text": "two\nlines\n"}),
        ("type", {"text": "weather\n"}),
        ("finished", {"text": "Done."}),
        ("press_back", {}),
    ]
    assert results("ui_tars", text, QWEN_2_5) == [
        Action(action=ActionName(name), raw=raw, thought="Look.", **values)
        for raw, (name, values) in zip(calls, fields, strict=True)
    ]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (tags("fly"), "Unknown action 'fly'"),
        (tags("left_click"), "Unknown action 'left_click'"),
        (tags("click"), "click needs the argument start_box"),
        (tags("click", point="<point>1</point>"), "neither a point nor a box"),
        (tags("click", point='<function name="click">\n<parameter name="point">1 2'), "neither a point nor a box"),
        ("<function=click><parameter=point><point>1 2</point>", "argument point of 'click' is incomplete"),
        ("<function=click>1 2</function>", "arguments of 'click' are malformed"),
        ("<function=click>", "arguments of 'click' are malformed"),
    ],
)
def test_invalid_tags_give_a_reason(text: str, reason: str) -> None:
    assert reason in parse_error("ui_tars", f"<seed:tool_call>{tags('wait')}{text}</seed:tool_call>")


BOX = '{"bbox_2d": [100, 200, 300, 400], "label": "Save"}'
POINT = '{"point_2d": [500, 500], "label": "Search"}'
SAVE = Region("Save", at(400, 150), Box(200, 100, 600, 200, inside=True), BOX)
SEARCH = Region("Search", at(1000, 250), None, POINT)


@pytest.mark.parametrize(
    ("text", "regions"),
    [
        (f"```json\n[\n\t{BOX},\n\t{POINT}\n]\n```", [SAVE, SEARCH]),
        (f"Here they are: [{BOX}]", [SAVE]),
        (f"<think>[{POINT}]?</think>\n[{BOX}]", [SAVE]),
        (f"{BOX}\n{POINT}", [SAVE, SEARCH]),
        (f"{BOX}, {POINT}", [SAVE, SEARCH]),
        ("```json\n[]\n```", []),
        ('{"bbox": [300, 400, 100, 200]}', [Region(None, SAVE.point, SAVE.box, '{"bbox": [300, 400, 100, 200]}')]),
        ('{"point": [500, 500.0]}', [Region(None, SEARCH.point, None, '{"point": [500, 500.0]}')]),
        (
            '{"bbox_2d": [0, 0, 1000, 1001]}',
            [Region(None, at(1000, 250.2), Box(0, 0, 2000, 500.5, inside=False), '{"bbox_2d": [0, 0, 1000, 1001]}')],
        ),
    ],
)
def test_points_and_boxes(text: str, regions: list[Region]) -> None:
    assert results("grounding", text) == regions


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("It is at the top.", "no JSON with bbox_2d, bbox, point_2d, point"),
        ("[100, 200]", "no JSON with"),
        ('[{"box_2d": [1, 2, 3, 4]}]', "A region has none of bbox_2d"),
        ('[{"bbox_2d": [1, 2, 3]}]', "bbox_2d must be a list of 4 numbers: '[1, 2, 3]'"),
        ('[{"bbox_2d": [[1, 2, 3, 4]]}]', "bbox_2d must be a list of 4 numbers"),
        ('[{"bbox_2d": [1, 2, 3, NaN]}]', "bbox_2d must be a list of 4 numbers"),
        ('[{"point_2d": [1, 2, 3, 4]}]', "point_2d must be a list of 2 numbers"),
        ('[{"point_2d": [1, 2], "label": 3}]', "label of a region is not a text"),
        (f"[{BOX}, {{", "JSON is malformed or incomplete"),
        (f"[{BOX}, ", "list of regions is incomplete"),
        (f"[{BOX}", "list of regions is incomplete"),
    ],
)
def test_invalid_regions_give_a_reason(text: str, reason: str) -> None:
    assert reason in parse_error("grounding", text)
