"""The message parser: borders of sections, malformed calls, and prompts that end inside a section."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.support.message_samples import SAMPLES, TOOLS, calls_of, parsed
from worker.output.content_tokens import ContentTokens
from worker.output.format import PLAIN, MessageFormat, Part, channel_format, think_edges, tool_format_named
from worker.output.parser import Delta, MessageParser, merged, message_parser
from worker.output.text_field import TextField
from worker.output.tool_calls import ToolCalls

START, END, TURN = 1, 2, 9


def form(tool: str = "json_tools") -> MessageFormat:
    return MessageFormat(
        edges=think_edges("<think>", "</think>"),
        tool=tool_format_named(tool),
        think_start=(START,),
        think_end=(END,),
        turn_tokens=frozenset({TURN}),
    )


def read(text: str, tool: str = "json_tools", **options: Any) -> Delta:
    """Return the message of an answer, and check that it does not depend on the cuts."""
    options = {"prompt": (), "tools": TOOLS, "seed": "job_1"} | options
    whole = parsed(message_parser(form(tool), **options), [text])
    assert parsed(message_parser(form(tool), **options), list(text)) == whole
    return whole


def call(body: str, tool: str = "json_tools") -> list[tuple[str, Any]]:
    """Return the calls in a section; if there is none, check that it is content."""
    declared = tool_format_named(tool)
    text = declared.start + body + declared.end
    message = read(text, tool)
    if "tool_calls" not in message:
        assert message == {"content": text}
    return calls_of(message)


def test_text_of_a_model_without_markers_is_content_unchanged() -> None:
    text = " <think> a\n</think> \n"
    assert parsed(MessageParser(PLAIN), list(text)) == {"content": text}
    assert parsed(MessageParser(PLAIN), [""]) == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (" Hello \n", {"content": " Hello \n"}),
        ("<think>\na\n</think>\n\n Hello \n", {"reasoning_content": "a", "content": "Hello \n"}),
        ("<think>\n\n</think>\n\nHello", {"content": "Hello"}),
        ("a\n<think>b</think>\nc", {"reasoning_content": "b", "content": "a\n\nc"}),
        ("<think>a</think><think>b</think>c", {"reasoning_content": "a\n\nb", "content": "c"}),
        ("a</think>\nb", {"content": "a\nb"}),
        ("</think>\n\nb", {"content": "b"}),
        ("<think>a<think>b", {"reasoning_content": "a\n\nb"}),
        ("<think>a", {"reasoning_content": "a"}),
        ("<think> \n", {}),
        ("a <thin", {"content": "a <thin"}),
        ("<<think>a</think>", {"content": "<", "reasoning_content": "a"}),
    ],
)
def test_markers_and_the_space_next_to_them_are_not_in_the_message(text: str, message: Delta) -> None:
    assert read(text) == message


@pytest.mark.parametrize(
    ("prompt", "opened"),
    [
        ([TURN, 5, START], True),
        ([TURN, 5, START, 6, 7], True),  # the answer continues reasoning
        ([TURN, START, 6, END, 7], False),
        ([START, 6, TURN, 5], False),  # in an earlier message
        ([START, 5], True),
        ([5, 6], False),
        ([], False),
    ],
)
def test_the_end_of_the_prompt_says_whether_the_answer_begins_with_reasoning(prompt: list[int], opened: bool) -> None:
    text = "I see.\n</think>\nHello"
    expected = {"reasoning_content": "I see.", "content": "Hello"} if opened else {"content": "I see.\n\nHello"}
    assert read(text, prompt=prompt) == expected
    assert form().reasoning_is_open(prompt) is opened


@pytest.mark.parametrize(
    ("prompt_end", "answer", "message"),
    [
        ("assistant", "<|channel|>final<|message|>Hi", {"content": "Hi"}),
        ("assistant", "<|channel|>analysis<|message|>Hm", {"reasoning_content": "Hm"}),
        ("assistant<|channel|>analysis<|message|>I am", " sure.<|end|>", {"reasoning_content": "sure."}),
        ("assistant<|channel|>final<|message|>Once", " upon <|return|>", {"content": " upon"}),
        ("assistant", "Hello", {"content": "Hello"}),  # the model writes no header
        ("assistant", "<|channel|>analysis", {}),
        ("assistant", "<|channel|>commentary<|message|>Now.<|end|>", {"content": "Now."}),
        (
            "assistant",
            "<|channel|>commentary<|message|>A<|end|><|start|>assistant<|channel|>final<|message|>B",
            {"content": "A\n\nB"},
        ),
        ("assistant", "<|channel|>commentary to=functions.f<|message|>{oops<|call|>x", {"content": "{oops"}),
        ("assistant", "<|channel|>commentary to=browser.open<|message|>x<|end|>", {"content": "x"}),
    ],
)
def test_channels_continue_from_the_prompt(prompt_end: str, answer: str, message: Delta) -> None:
    channels = channel_format(lambda _tokens: prompt_end, frozenset({TURN}))
    for pieces in ([answer], list(answer)):
        assert parsed(message_parser(channels, [TURN], TOOLS, "job_1"), pieces) == message


def test_a_call_on_any_channel_is_a_call_and_ends_the_answer() -> None:
    channels = channel_format(lambda _tokens: "assistant")
    parser = message_parser(channels, [], TOOLS, "job_1")
    text = '<|channel|>analysis to=functions.list_files code<|message|>{"path": "/"}<|call|><|start|>more'
    assert calls_of(parsed(parser, list(text))) == [("list_files", {"path": "/"})]
    assert parser.done


@pytest.mark.parametrize(
    ("tool", "body", "arguments"),
    [
        ("json_tools", '{"name": "f", "arguments": {"x": "a</tool_call>b"}}', {"x": "a</tool_call>b"}),
        ("qwen3_coder", "<function=f><parameter=x>\n</tool_call>\n</parameter></function>", {"x": "</tool_call>"}),
        ("glm47", "f<arg_key>x</arg_key><arg_value></tool_call></arg_value>", {"x": "</tool_call>"}),
    ],
)
def test_an_end_marker_inside_a_value_belongs_to_the_value(tool: str, body: str, arguments: dict[str, Any]) -> None:
    assert call(body, tool) == [("f", arguments)]


@pytest.mark.parametrize(
    "body",
    [
        "",
        "{}",
        "[]",
        "null",
        "7",
        '{"name": "f", "arguments": {"x": 1}',
        '{"name": "f", "arguments": [1]}',
        '{"name": "f", "arguments": "not JSON"}',
        '{"name": "f", "arguments": {"x": NaN}}',
        '{"name": "", "arguments": {}}',
        '{"name": "two words", "arguments": {}}',
        '{"name": 7, "arguments": {}}',
        '{"arguments": {}}',
        '[{"name": "f", "arguments": {}}, {"name": "g", "arguments": 7}]',
        "[" * 100_000,
        '{"name": "f", "arguments": {"x": ' + "9" * 5000 + "}}",
    ],
)
def test_a_malformed_call_is_content(body: str) -> None:
    assert call(body) == []


def test_a_value_that_the_librarys_parser_would_cut_makes_a_call_malformed() -> None:
    assert call('"f"><param name="x"></function></param>', "minicpm5") == []


@pytest.mark.parametrize("sample", SAMPLES[:-1], ids=lambda sample: sample.name)
@pytest.mark.parametrize(
    "body", ["", "???", "call:a{" * 1000, "<|open|>call" * 1000, "<atem:invoke" * 1000, "-" * 9999]
)
def test_no_parser_raises_or_takes_long_for_nonsense(sample: Any, body: str) -> None:
    declared = tool_format_named(sample.name)
    assert ToolCalls(declared, TOOLS, "job_1", parallel=True).parse(body) == []


@pytest.mark.parametrize(
    ("arguments", "parsed_arguments"),
    [
        ("{}", {}),
        ("null", {}),
        ('"{\\"x\\": 1}"', {"x": 1}),
        ('{"x": "\\ud800"}', {"x": "\ud800"}),
        ('{"ü": []}', {"ü": []}),
    ],
)
def test_arguments_are_always_an_object_that_can_be_sent(arguments: str, parsed_arguments: dict[str, Any]) -> None:
    message = read(f'<tool_call>{{"name": "f", "arguments": {arguments}}}</tool_call>')
    (called,) = message["tool_calls"]
    assert json.loads(called["function"]["arguments"]) == parsed_arguments
    assert called["function"]["arguments"].encode()


def test_a_call_without_its_end_marker_counts_only_if_it_must_be_complete() -> None:
    assert calls_of(read('<tool_call>{"name": "f", "arguments": {}}\n</tool_')) == [("f", {})]
    cut = "<tool_call>get_weather<arg_key>city</arg_key><arg_value>Paris</arg_value><arg_key>days"
    assert read(cut, "glm47") == {"content": cut}


def test_types_of_arguments_come_from_the_tools() -> None:
    body = "<function=get_weather><parameter=city>75001</parameter><parameter=days>3</parameter></function>"
    assert call(body, "qwen3_coder") == [("get_weather", {"city": "75001", "days": 3})]


def test_ids_have_the_form_that_the_models_template_requires() -> None:
    def ids(text: str, tool: str) -> list[str]:
        return [each["id"] for each in read(text, tool)["tool_calls"]]

    samples = {sample.name: sample.calls for sample in SAMPLES}
    assert ids(samples["kimi_k2"], "kimi_k2") == ["functions.get_weather:0", "functions.list_files:1"]
    assert all(len(each) == 9 and each.isalnum() for each in ids(samples["mistral"], "mistral"))
    declared = tool_format_named("kimi_k2")
    (made,) = ids(f'{declared.start}{{"name": "f", "arguments": {{}}, "id": "\\ud800"}}{declared.end}', "kimi_k2")
    assert made.startswith("call_"), "an id that cannot be sent is not used"
    others = ids(samples["json_tools"], "json_tools")
    assert all(each.startswith("call_") for each in others)
    assert ids(samples["json_tools"], "json_tools") == others
    assert others != [each["id"] for each in read(samples["json_tools"], seed="job_2")["tool_calls"]]


def test_content_after_a_call_and_space_between_calls() -> None:
    one = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    assert read(f"{one}\n\n{one}\n").get("content") is None
    assert read(f"Wait.\n{one}\nDone.\n")["content"] == "Wait.\n\nDone.\n"


def test_deltas_are_merged_in_order() -> None:
    deltas: list[Delta] = [
        {"content": "a", "content_tokens": [0, 2]},
        {"content": "b", "content_tokens": [2, 3, 5, 6]},
        {"tool_calls": [1], "content_tokens": [8, 9]},
        {"tool_calls": [2]},
    ]
    assert merged(deltas) == {"content": "ab", "content_tokens": [0, 3, 5, 6, 8, 9], "tool_calls": [1, 2]}
    assert deltas[0] == {"content": "a", "content_tokens": [0, 2]}


def test_a_character_of_several_tokens_has_them_all() -> None:
    tokens = ContentTokens()
    for text in ("<think>", "", "", "🙂", "</think>", "", "🙂", "x"):
        tokens.add_token(text)
    assert tokens.of([(16, 17)]) == [5, 7]
    assert tokens.of([(17, 18)]) == [7, 8]
    assert tokens.of([(17, 18)]) == []


def test_space_is_held_back_until_it_is_known_to_be_inside_the_text() -> None:
    field = TextField(trims=False)
    assert [field.push(text, 0) for text in (" ", "a ", "b", "\n")] == ["", " a", " b", ""]
    assert field.flush() == "\n"
    assert field.spans == [(0, 1)]


def test_parts_are_reported_for_the_count_of_reasoning_tokens() -> None:
    parser = message_parser(form(), [], (), "job_1")
    parts = []
    for text in ("<think>", "a", "</think>", "b"):
        parser.push(text)
        parts.append(parser.part)
    assert parts == [Part.REASONING, Part.REASONING, Part.CONTENT, Part.CONTENT]
