"""Answers in every format that mlx-lm knows are split into reasoning, content and tool calls, however they are cut."""

from __future__ import annotations

import dataclasses
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.message_samples import FILES, SAMPLES, WEATHER, Sample, calls_of, parsed, parser_for
from worker.output.content_tokens import ContentTokens
from worker.output.format import MessageFormat, message_format
from worker.output.parser import Delta, merged
from worker.runner.detokenizer import make_detokenizer

Tokenizers = Callable[[Sample], Any]
REASONING = "They ask for Paris.\nI need <b>tools</b>: [x] {y}."
CONTENT = "Let me look at « Paris » 🙂, and at the files."
each_format = pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.name)
_FORMATS: dict[str, MessageFormat] = {}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Tokenizers:
    """Return a function that loads a sample's tokenizer once."""
    loaded: dict[str, Any] = {}

    def load(sample: Sample) -> Any:
        if sample.name not in loaded:
            loaded[sample.name] = sample.tokenizer(tmp_path_factory.mktemp(sample.name))
        return loaded[sample.name]

    return load


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, MessageFormat]:
    """The format of each sample, by name."""
    return {sample.name: sample.form(tmp_path_factory.mktemp(sample.name)) for sample in SAMPLES}


def test_there_is_an_answer_for_every_parser_of_mlx_lm() -> None:
    from mlx_lm import tool_parsers

    modules = {module.name for module in pkgutil.iter_modules(tool_parsers.__path__)}
    assert modules | {"harmony"} == {sample.name for sample in SAMPLES}


def test_there_is_an_answer_for_every_marker_of_reasoning_of_mlx_lm(forms: dict[str, MessageFormat]) -> None:
    from mlx_lm import tokenizer_utils

    source = Path(tokenizer_utils.__file__).read_text()
    markers = {part for sample in SAMPLES for part in sample.think}
    body = source[source.index("def _infer_thinking") : source.index("def _is_xtml_vocab")]
    declared = [
        line.split('"') for line in body.splitlines() if "think_start =" in line or line.strip().startswith('("<')
    ]
    assert len(declared) == 5
    assert all(any(line[1] in marker for marker in markers) for line in declared)


def test_the_format_is_found_in_a_template_that_is_set_later(tmp_path: Path) -> None:
    sample = next(each for each in SAMPLES if each.name == "json_tools")
    tokenizer = dataclasses.replace(sample, template="").tokenizer(tmp_path)
    before = message_format(tokenizer).tool
    assert before is not None and before.is_explained
    tokenizer.chat_template = sample.template
    after = message_format(tokenizer).tool
    assert after is not None and (after.name, after.is_explained) == ("json_tools", False)


@each_format
def test_an_answer_has_reasoning_content_and_calls(sample: Sample, forms: dict[str, MessageFormat]) -> None:
    message = parsed(parser_for(forms[sample.name]), [sample.answer(REASONING, CONTENT)])
    assert (message["reasoning_content"], message["content"]) == (REASONING, CONTENT)
    assert calls_of(message) == [WEATHER, FILES]
    assert [call["index"] for call in message["tool_calls"]] == [0, 1]
    assert len({call["id"] for call in message["tool_calls"]}) == 2


@each_format
@pytest.mark.parametrize(("reasoning", "content"), [("", ""), (REASONING, ""), ("", CONTENT)])
def test_parts_that_an_answer_does_not_have_are_absent(
    sample: Sample, reasoning: str, content: str, forms: dict[str, MessageFormat]
) -> None:
    message = parsed(parser_for(forms[sample.name]), [sample.answer(reasoning, content)])
    assert message.get("reasoning_content", "") == reasoning
    assert message.get("content", "") == content
    assert calls_of(message) == [WEATHER, FILES]


@each_format
def test_the_message_does_not_depend_on_where_the_text_is_cut(sample: Sample, forms: dict[str, MessageFormat]) -> None:
    form, text = forms[sample.name], sample.answer(REASONING, CONTENT)
    whole = parsed(parser_for(form), [text])
    assert parsed(parser_for(form), list(text)) == whole
    for cut in range(len(text)):
        assert parsed(parser_for(form), [text[:cut], text[cut:]]) == whole, cut


@each_format
def test_the_message_is_the_same_token_by_token(
    sample: Sample, tokenizers: Tokenizers, forms: dict[str, MessageFormat]
) -> None:
    tokenizer, text = tokenizers(sample), sample.answer(REASONING, CONTENT)
    detokenizer = make_detokenizer(tokenizer)
    pieces = [*map(detokenizer.add, tokenizer.encode(text, add_special_tokens=False)), detokenizer.finish()]
    assert "".join(pieces) == text
    form = forms[sample.name]
    assert parsed(parser_for(form), pieces) == parsed(parser_for(form), [text])


@each_format
def test_a_resumed_answer_continues_with_the_rest_of_the_message(
    sample: Sample, forms: dict[str, MessageFormat]
) -> None:
    """The first attempt ends anywhere; the second one replays its text and emits only what is new."""
    form, text = forms[sample.name], sample.answer(REASONING, CONTENT)
    whole = parsed(parser_for(form), list(text))
    for cut in range(0, len(text), 11):
        before = list(map(parser_for(form).push, text[:cut]))
        second = parser_for(form)
        for letter in text[:cut]:
            second.push(letter)
        assert merged([*before, *map(second.push, text[cut:]), second.finish()]) == whole


@each_format
def test_an_answer_that_ends_early_never_has_half_a_call(sample: Sample, forms: dict[str, MessageFormat]) -> None:
    form, text = forms[sample.name], sample.answer(REASONING, CONTENT)
    for cut in range(len(text)):
        message = parsed(parser_for(form), [text[:cut]])
        calls = calls_of(message)
        assert calls == [WEATHER, FILES][: len(calls)], cut
        reasoning = message.get("reasoning_content", "")  # a marker that is cut is text
        assert REASONING.startswith(reasoning) or reasoning.startswith(REASONING)


@each_format
def test_unfinished_reasoning_is_reasoning(sample: Sample, forms: dict[str, MessageFormat]) -> None:
    message = parsed(parser_for(forms[sample.name]), [sample.think[0] + REASONING])
    assert message == {"reasoning_content": REASONING}


@each_format
def test_a_call_inside_reasoning_is_reasoning(sample: Sample, forms: dict[str, MessageFormat]) -> None:
    if sample.think[1] in sample.calls or sample.name == "harmony":
        pytest.skip("in this format, calls end a section of reasoning")
    text = sample.think[0] + "a " + sample.calls + sample.think[1]
    message = parsed(parser_for(forms[sample.name]), [text])
    assert message == {"reasoning_content": "a " + sample.calls}


@each_format
def test_without_parallel_calls_the_answer_ends_after_the_first(
    sample: Sample, forms: dict[str, MessageFormat]
) -> None:
    text = sample.answer(REASONING, CONTENT)
    parser = parser_for(forms[sample.name], parallel=False)
    assert calls_of(parsed(parser, list(text))) == [WEATHER]
    assert parser.done or not (parser_for(forms[sample.name])._tools or Any).form.end  # type: ignore[union-attr]


@each_format
def test_without_tools_a_call_is_content(sample: Sample, forms: dict[str, MessageFormat]) -> None:
    message = parsed(parser_for(forms[sample.name], tools=False), list(sample.answer(REASONING, CONTENT)))
    assert "tool_calls" not in message
    assert message["content"].startswith(CONTENT)
    assert "Paris" in message["content"][len(CONTENT) :]


BROKEN = {"harmony": '{"city": "Paris", ', "mistral": '{"city": "Paris", '}


@each_format
def test_a_malformed_call_is_content_and_later_calls_count(sample: Sample, forms: dict[str, MessageFormat]) -> None:
    form = forms[sample.name]
    assert form.tool is not None
    if sample.name == "harmony":
        start, end = "<|channel|>commentary to=functions.get_weather<|message|>", "<|end|><|start|>assistant"
    else:
        start, end = form.tool.start, form.tool.end
    if not end:
        pytest.skip("in this format, calls extend to the end of the answer")
    prefix = "to=tools" if sample.name == "muse_spark" else ""
    separator = "<|eom|>" if sample.name == "muse_spark" else ""
    text = f"{prefix}{start}[a {{ broken ( call{end}{separator}{sample.calls}"
    message = parsed(parser_for(form), list(text))
    assert "[a { broken ( call" in message["content"]
    assert calls_of(message) == [WEATHER, FILES]


@each_format
def test_ids_of_calls_are_the_same_in_every_attempt(sample: Sample, forms: dict[str, MessageFormat]) -> None:
    first, second = (parsed(parser_for(forms[sample.name]), [sample.calls]) for _ in range(2))
    assert first == second


@each_format
def test_special_tokens_that_are_markers_are_never_content(sample: Sample, forms: dict[str, MessageFormat]) -> None:
    form, text = forms[sample.name], sample.answer(REASONING, CONTENT)
    for cut in range(len(text)):
        content = parsed(parser_for(form), [text[:cut]]).get("content", "")
        assert not [each for each in [*sample.think, *sample.special] if each in content]


@each_format
def test_the_tokens_of_content_are_known(sample: Sample, forms: dict[str, MessageFormat]) -> None:
    """With one token per character, the content tokens spell the content."""
    text, parser, tokens = sample.answer(REASONING, CONTENT), parser_for(forms[sample.name]), ContentTokens()
    runs: list[int] = []
    deltas: list[Delta] = []
    for letter in [*text, None]:
        if letter is not None:
            tokens.add_token(letter)
        deltas.append(parser.finish() if letter is None else parser.push(letter))
        runs += tokens.of(parser.spans)
    spelled = "".join(text[start:end] for start, end in zip(runs[::2], runs[1::2], strict=True))
    assert spelled == merged(deltas)["content"] == CONTENT


def fragments(sample: Sample) -> st.SearchStrategy[str]:
    """Return texts that consist of markers, parts of markers, calls and other text."""
    markers = [*sample.think, *sample.message, *sample.special, sample.calls, "<tool_call>", "</tool_call>"]
    parts = [piece for marker in markers for piece in (marker, marker[: len(marker) // 2], marker[1:])]
    return st.lists(
        st.one_of(st.sampled_from(parts), st.sampled_from([" ", "\n", "\n\n", "é🙂", "word", '"}', "<"]))
    ).map("".join)


@each_format
@given(data=st.data())
def test_any_text_gives_the_same_message_however_it_is_cut(
    sample: Sample, forms: dict[str, MessageFormat], data: st.DataObject
) -> None:
    text = data.draw(fragments(sample))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)))))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    for tools, parallel in ((True, True), (True, False), (False, True)):
        cut, whole = (
            parsed(parser_for(forms[sample.name], tools=tools, parallel=parallel), each) for each in (pieces, [text])
        )
        assert cut == whole
