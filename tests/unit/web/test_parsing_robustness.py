"""Parsing arbitrary, hostile and very long output of GUI models."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shared.jobs.record import Parsing
from shared.models.registry import ModelCard
from web.parsing.parse import MAX_RESULTS, parse
from web.parsing.ui_tars_calls import UI_TARS

CARDS = [
    None,
    ModelCard("a", "text", 512),
    ModelCard("a", "vision", 512, image={"factor": 28, "min_pixels": 100 * 28 * 28, "max_pixels": 16384 * 28 * 28}),
    ModelCard("a", "vision", 512, coordinates="thousandths"),
]
FORMATS = ["ui_tars", "computer_use", "grounding"]
SIZE = (1120, 560)
LONG = 1_000_000
"""Characters. Parsing in quadratic time would not end."""

FRAGMENTS = [
    *[f"{name}(" for name in (*UI_TARS, "fly")],
    "Action:", "Action\uff1a", "Thought:", "Action_Summary:", "Reflection:", "start_box=", "content=", "key=",
    "direction=", "'", '"', "\\", ")", "(", "[", "]", ",", "\n", " ", ";", "up", "(1,2)", "<point>1 2</point>",
    "-1.5", "x", "\ud800", "<function=click>", "</function>", "<parameter=point>", "</parameter>", "<tool_call>",
    '{"name": "computer_use", "arguments": ', '{"action": "left_click", "coordinate": ', "[1, 2]", "[", "]", "{", "}",
    '{"bbox_2d": [1, 2, 3, 4], "label": "a"}', '{"point_2d": ', "NaN", "Infinity", "1e400", '"keys": [" "]', "</think>",
]  # fmt: skip
TEXTS = st.one_of(st.text(), st.lists(st.sampled_from(FRAGMENTS), max_size=40).map("".join))
IMAGES = st.none() | st.tuples(st.integers(0, 5000), st.integers(0, 5000))


@given(st.sampled_from(FORMATS), TEXTS, IMAGES, st.sampled_from(CARDS))
@example("ui_tars", "Action: fly\u2028()", None, None)
@example("ui_tars", "click(start_box='\n\u2028\x85')", None, None)
def test_any_text_gives_either_results_or_a_reason_of_one_line(
    format_: str, text: str, size: tuple[int, int] | None, card: ModelCard | None
) -> None:
    parsed, reason = parse(text, Parsing(format_, size), card)
    assert not parsed or reason is None
    assert parsed or reason is not None or format_ == "grounding"  # which may be an empty list
    assert reason is None or (len(reason.splitlines()) == 1 and len(reason) < 500)
    assert all(each.raw in text for each in parsed)


TAGGED = '<function=computer_use><parameter=action>key</parameter><parameter=keys>["{}"]</parameter></function>'


@pytest.mark.parametrize(
    ("format_", "text"),
    [
        ("grounding", r'[{"bbox_2d": [1, 2, 3, 4], "label": "\ud800"}]'),
        ("computer_use", r'{"name": "computer_use", "arguments": {"action": "type", "text": "a\udfff"}}'),
        ("computer_use", TAGGED.format(r"\ud83d")),
    ],
)
def test_half_of_a_surrogate_pair_is_no_result(format_: str, text: str) -> None:
    parsed, reason = parse(text, Parsing(format_, SIZE), None)
    assert (parsed, reason) == ([], "The JSON has half of a surrogate pair, which is no character.")


REPEATED = [
    "'", "' ", "')", "')x", "', )x", "\\", "\\'", "', a=", ",", "a=b,", "a='', ", " ", "\n", "\n ", ";", "(",
    "a", "a(", "1", "1 ", "<point>", "<|box_start|>", "Action:", "Action: ", "Action:\n", "\nAction:",
    "\nAction:a", "Action: type(content='", "\nAction: type(content='')x", "wait()\n\n",
    "\nAction: wait() \nThought: a", "type(content='', )b", "\nThought", "Thought:", "Action_Summary",
    "Reflection:", "<function=click>", "<function=click></function>", "<function=a><parameter=b>", "<parameter=a>",
    '{"name": ', '{"name": "a", "arguments": {}}', '{"a": ', '{"', "[", "[{", '{"bbox_2d": [1, 2, 3, 4]}, ', "</think>",
]  # fmt: skip
BEGINNINGS = [
    "",
    "Action: ",
    "Action: type(content='",
    "Action: type(",
    "Action: click(start_box='",
    "Action: click(start_box=(",
    "<function=click>",
    "<function=click><parameter=point>",
    '{"name": "computer_use", "arguments": ',
    '[{"bbox_2d": ',
]


@pytest.mark.parametrize("start", BEGINNINGS)
@pytest.mark.parametrize("fragment", REPEATED)
def test_long_texts_are_parsed_in_linear_time(start: str, fragment: str) -> None:
    text = start + fragment * (LONG // 25 // len(fragment))
    for whole in (text, f"{text}\nAction: wait()", f"{text}')"):
        for format_ in FORMATS:
            parsed, reason = parse(whole, Parsing(format_, SIZE), CARDS[2])
            assert not parsed or reason is None
            assert reason is None or len(reason) < 500


def test_long_output_is_parsed_completely() -> None:
    parsing = Parsing("ui_tars", SIZE)
    (action,), reason = parse(f"Action: type(content='{'it is ' * LONG}')", parsing, None)
    assert (action.text, reason) == ("it is " * LONG, None)
    gap = "\n" * (LONG // MAX_RESULTS)
    actions, reason = parse("Action: " + f"wait(){gap}" * MAX_RESULTS, parsing, None)
    assert (len(actions), reason) == (MAX_RESULTS, None)
    regions, reason = parse("[" + f'{{"point": [1, 2]}},{gap}' * MAX_RESULTS + "]", Parsing("grounding", SIZE), None)
    assert (len(regions), reason) == (MAX_RESULTS, None)


def test_more_results_than_any_model_means_are_refused() -> None:
    """A list of a hundred jobs with all actions that their texts can hold would take gigabytes."""
    number = LONG // 10
    parsed, reason = parse("Action: " + "wait()\n\n" * number, Parsing("ui_tars", SIZE), None)
    assert (parsed, reason) == ([], f"The text has {number} actions, more than the limit of {MAX_RESULTS}.")


@pytest.mark.parametrize("depth", [100, 900, 950, 990, 100_000])
def test_deep_nesting_gives_a_reason(depth: int) -> None:
    nested = "[" * depth + "]" * depth
    for format_, text in (
        ("grounding", f'{{"point": {nested}}}'),
        (
            "computer_use",
            f'{{"name": "computer_use", "arguments": {{"action": "left_click", "coordinate": {nested}}}}}',
        ),
    ):
        parsed, reason = parse(text, Parsing(format_, SIZE), None)
        assert parsed == [] and reason
