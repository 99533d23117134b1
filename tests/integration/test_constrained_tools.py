"""Constrained tool calls in every format: random answers of the grammar are calls that satisfy the schemas."""

from __future__ import annotations

import importlib
import json
import random
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import numpy as np
import pytest

pytest.importorskip("mlx_lm")

from tokenizers import AddedToken, Tokenizer

from shared.errors import PromptRefused
from shared.jobs.request import Constraint, Request, Sampling
from worker.output.format import MessageFormat, channel_format, think_edges
from worker.output.parser import merged, message_parser
from worker.output.tool_calls import ToolFormat
from worker.runner.logits.constraint import ConstraintCompiler, Guide

FORMATS = (
    *("function_gemma", "gemma4", "glm47", "json_tools", "kimi_k2", "kimi_k3", "laguna", "longcat", "minicpm5"),
    *("minimax_m2", "mistral", "muse_spark", "pythonic", "qwen3_coder", "harmony"),
)
CHANNELS = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|constrain|>", "<|call|>")
KIMI = ("<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>")
PIECES = ("<|open|>", "<|close|>", "<|sep|>")
WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 6},
        "unit": {"enum": ["c", "f"]},
        "days": {"type": "array", "items": {"type": "integer", "minimum": 1, "maximum": 9}, "maxItems": 2},
    },
    "required": ["city", "unit", "days"],
    "additionalProperties": False,
}
SCHEMAS = {"weather": WEATHER, "now": {"type": "object", "properties": {}, "additionalProperties": False}}
TOOLS: tuple[dict[str, Any], ...] = (
    {"type": "function", "function": {"name": "weather", "parameters": WEATHER, "strict": True}},
    {"type": "function", "function": {"name": "now", "strict": True}},
)
EOS = 2


def request(choice: str, tools: tuple[dict[str, Any], ...] = TOOLS, **fields: Any) -> Request:
    return Request("m", 100, Sampling(0.0), tools=tools, tool_choice=choice, parse="message", **fields)


class Model:
    """A model's tokenizer and format.

    Args:
        special: whether the markers are special tokens; otherwise some of them are ordinary text.
    """

    def __init__(self, folder: Path, name: str, *, special: bool = True, thinks: bool = False) -> None:
        backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.first_added = backend.get_vocab_size()
        self.form = _form(name)
        tool = self.form.tool
        assert tool is not None
        markers = [*CHANNELS, *KIMI, *PIECES] if name == "kimi_k3" or not tool.start else [*KIMI, tool.start, tool.end]
        added = [*(each for each in markers if each), *(["<think>", "</think>"] if thinks else [])]
        if special:
            backend.add_tokens([AddedToken(each, special=True, normalized=False) for each in added])
        if thinks:
            start, end = (backend.token_to_id(each) for each in ("<think>", "</think>"))
            edges = think_edges("<think>", "</think>")
            self.form = MessageFormat(edges=edges, tool=tool, think_start=(start,), think_end=(end,))
        self.backend = backend
        self.compiler = ConstraintCompiler(
            SimpleNamespace(backend_tokenizer=backend), self.form, backend.get_vocab_size(), frozenset({EOS})
        )

    def guide(self, request: Request, prompt: str = "word") -> Guide:
        constraint = self.compiler.compile(request)
        assert constraint is not None
        return constraint.start(self.ids(prompt), [])

    def ids(self, text: str) -> list[int]:
        ids: list[int] = self.backend.encode(text, add_special_tokens=False).ids
        return ids

    def answer(self, guide: Guide, seed: int, limit: int = 2000) -> str:
        """Choose random tokens until the answer ends. Prefers tokens that end something."""
        rng = random.Random(seed)
        tokens: list[int] = []
        while len(tokens) < limit:
            token = self.next_token(guide, rng)
            guide.advance(token)
            assert guide.error is None
            if token == EOS:
                return str(self.backend.decode(tokens, skip_special_tokens=False))
            tokens.append(token)
        pytest.fail("the answer does not end")

    def next_token(self, guide: Guide, rng: random.Random) -> int:
        if guide.forced is not None:
            return guide.forced
        assert guide.follows_grammar and guide.matcher is not None
        bits = np.frombuffer(guide.matcher.compute_bitmask(), dtype=np.uint8)
        allowed = [int(token) for token in np.nonzero(np.unpackbits(bits, bitorder="little"))[0]]
        ends = [token for token in allowed if token == EOS or token >= self.first_added]
        return rng.choice(ends if ends and rng.random() < 0.5 else allowed)

    def accepts(self, guide: Guide, text: str) -> bool:
        """Return whether a whole answer is allowed, fed token by token as a model would write it."""
        for token in self.ids(text):
            matcher = guide.matcher if guide.follows_grammar and token != guide.think_start else None
            if matcher is not None and matcher.validate_tokens([token]) == 0:
                return False
            guide.advance(token)
        return guide.error is None and guide.matcher is not None and guide.matcher.is_accepting()

    def message(self, text: str, request: Request) -> dict[str, Any]:
        parser = message_parser(
            self.form, self.ids("word"), request.tools or (), "job", parallel_calls=request.parallel_tool_calls
        )
        return merged([parser.push(text), parser.finish()])


def _form(name: str) -> MessageFormat:
    if name == "harmony":
        return channel_format()
    module = importlib.import_module(f"mlx_lm.tool_parsers.{name}")
    return MessageFormat(tool=ToolFormat.of(module.parse_tool_call, module.tool_call_start, module.tool_call_end))


def check_calls(message: dict[str, Any]) -> list[str]:
    """Check the arguments of all calls; return the names of the functions."""
    assert not message.get("content", "").strip()
    calls = [call["function"] for call in message["tool_calls"]]
    for call in calls:
        jsonschema.validate(json.loads(call["arguments"]), SCHEMAS[call["name"]])
    return [call["name"] for call in calls]


@pytest.mark.parametrize("special", [True, False], ids=["special", "text"])
@pytest.mark.parametrize("name", FORMATS)
def test_a_demanded_call_is_made(tiny_model_path: Path, name: str, special: bool) -> None:
    if name == "harmony" and not special:
        pytest.skip("its markers are special tokens")
    model = Model(tiny_model_path, name, special=special)
    required, named = request("required"), request("function:weather")
    one = request("required", parallel_tool_calls=False)

    def names(request: Request, seed: int) -> list[str]:
        return check_calls(model.message(model.answer(model.guide(request), seed), request))

    for seed in range(3):
        assert names(required, seed)
        assert names(named, seed) == ["weather"]
        assert len(names(one, seed)) == 1


CALL = '{{"name": "weather", "arguments": {}}}'
VALID = CALL.format('{"city": "x", "unit": "c", "days": []}')
INVALID = CALL.format('{"city": 5}')


@pytest.mark.parametrize("special", [True, False], ids=["special", "text"])
def test_strict_tools_constrain_only_calls(tiny_model_path: Path, special: bool) -> None:
    model = Model(tiny_model_path, "json_tools", special=special)
    auto = request("auto")
    valid, invalid = (f"<tool_call>\n{call}\n</tool_call>" for call in (VALID, INVALID))
    for text in ("Hello!", valid, f"Let me see: {valid}", f"{valid}\n{valid}"):
        assert model.accepts(model.guide(auto), text), text
    for text in (invalid, f"Let me see: {invalid}", f"{valid}\n{invalid}", "<tool_call>\nweather"):
        assert not model.accepts(model.guide(auto), text), text


def test_lax_tools_and_no_choice_constrain_nothing(tiny_model_path: Path) -> None:
    model = Model(tiny_model_path, "json_tools")
    lax = ({"type": "function", "function": {"name": "weather", "parameters": WEATHER}},)
    assert model.compiler.compile(request("auto", lax)) is None
    assert model.compiler.compile(request("none")) is None


def test_an_answer_satisfies_the_response_format_or_calls_a_tool(tiny_model_path: Path) -> None:
    model = Model(tiny_model_path, "json_tools")
    either = request("auto", constraint=Constraint("choice", '["yes", "no"]'))
    assert model.accepts(model.guide(either), "yes")
    assert model.accepts(model.guide(either), f"<tool_call>\n{VALID}\n</tool_call>")
    assert not model.accepts(model.guide(either), "perhaps")
    assert not model.accepts(model.guide(either), f"<tool_call>\n{INVALID}\n</tool_call>")


def test_a_call_comes_after_the_reasoning(tiny_model_path: Path) -> None:
    model = Model(tiny_model_path, "json_tools", thinks=True)
    call = f"<tool_call>\n{VALID}\n</tool_call>"
    thoughts = {"word <think>": f"let me think</think>{call}", "word": f"<think>hm</think>{call}", "word ": call}
    for prompt, text in thoughts.items():
        assert model.accepts(model.guide(request("required"), prompt), text), text
    assert model.guide(request("required"), "word <think>").must_not_end
    assert not model.accepts(model.guide(request("required"), "word"), f"hm</think>{call}")
    calm = request("required", template_variables={"enable_thinking": False})
    assert not model.accepts(model.guide(calm), f"<think>hm</think>{call}")


def test_channels_of_gpt_oss(tiny_model_path: Path) -> None:
    model = Model(tiny_model_path, "harmony")
    analysis = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant"
    final = "<|channel|>final<|message|>"
    call = "<|channel|>commentary to=functions.weather <|constrain|>json<|message|>"
    good, bad = (call + json.dumps({"city": city, "unit": "c", "days": []}) for city in ("x", 1))
    choice = Constraint("choice", '["yes", "no"]')
    own = Request("m", 9, Sampling(0.0), constraint=choice)
    for text in (f"{analysis}{final}yes", f"{final}no"):
        assert model.accepts(model.guide(own), text), text
    for text in (f"{analysis}{final}hm", good):
        assert not model.accepts(model.guide(own), text), text
    for text in (f"{analysis}{good}", f"{analysis}{final}hello"):
        assert model.accepts(model.guide(request("auto")), text), text
    assert not model.accepts(model.guide(request("auto")), bad)
    assert not model.accepts(model.guide(request("required")), f"{analysis}{final}hello")


def test_a_thinking_budget_ends_the_reasoning(tiny_model_path: Path) -> None:
    model = Model(tiny_model_path, "json_tools", thinks=True)
    end = model.backend.token_to_id("</think>")
    for budget in (0, 1, 3):
        guide = model.guide(Request("m", 9, Sampling(0.0), thinking_budget=budget), "word <think>")
        for _ in range(budget):
            assert guide.forced is None
            guide.advance(100)
        assert guide.forced == end
        guide.advance(end)
        assert guide.forced is None and not guide.must_not_end
    started = model.guide(Request("m", 9, Sampling(0.0), thinking_budget=1))
    for token in (model.backend.token_to_id("<think>"), 100):
        assert started.forced is None
        started.advance(token)
    assert started.forced == end
    lax = Model(tiny_model_path, "json_tools")
    assert lax.compiler.compile(Request("m", 9, Sampling(0.0), thinking_budget=1)) is None


def test_a_thinking_budget_begins_the_final_channel(tiny_model_path: Path) -> None:
    model = Model(tiny_model_path, "harmony")
    for constraint, forced in (
        (None, "<|end|><|start|>assistant<|channel|>final<|message|>"),
        (Constraint("choice", '["yes", "no"]'), "<|end|>"),
    ):
        guide = model.guide(Request("m", 9, Sampling(0.0), thinking_budget=2, constraint=constraint))
        for token in [*model.ids("<|channel|>analysis<|message|>"), 100, 101]:
            assert guide.forced is None
            guide.advance(token)
        tokens = []
        while guide.forced is not None:
            tokens.append(guide.forced)
            guide.advance(guide.forced)
        assert guide.error is None
        assert tokens == model.ids(forced)


def test_a_model_without_a_supported_tokenizer_refuses_constraints() -> None:
    compiler = ConstraintCompiler(SimpleNamespace(), MessageFormat(), 100, frozenset({EOS}))
    assert not compiler.supported
    with pytest.raises(PromptRefused, match="does not support constraints"):
        compiler.compile(Request("m", 9, Sampling(0.0), constraint=Constraint("json_object")))


PATCH = r"""
start: begin_patch hunk+ end_patch
begin_patch: "*** Begin Patch" LF
end_patch: "*** End Patch" LF?
hunk: "*** Add File: " filename LF add_line+
filename: /[a-z.]{1,9}/
add_line: "+" /[a-z{}" ]{0,9}/ LF
%import common.LF
"""
TEXT_TOOLS: tuple[dict[str, Any], ...] = (
    {"type": "function", "function": {"name": "patch", "grammar": PATCH, "strict": True}},
    TOOLS[0],
)
TEXT_FORMATS = [name for name in FORMATS if name not in ("mistral", "kimi_k2", "kimi_k3")]
A_PATCH = re.compile(r"\*\*\* Begin Patch\n(\*\*\* Add File: [a-z.]{1,9}\n(\+[a-z{}\" ]{0,9}\n)+)+\*\*\* End Patch\n?")


@pytest.mark.parametrize("special", [True, False], ids=["special", "text"])
@pytest.mark.parametrize(
    "name",
    [
        name if name in ("json_tools", "harmony") else pytest.param(name, marks=pytest.mark.long)
        for name in TEXT_FORMATS
    ],
)
def test_the_argument_of_a_function_is_text_of_a_grammar(tiny_model_path: Path, name: str, special: bool) -> None:
    if name == "harmony" and not special:
        pytest.skip("its markers are special tokens")
    model = Model(tiny_model_path, name, special=special)
    named = request("function:patch", TEXT_TOOLS)
    for seed in range(3):
        message = model.message(model.answer(model.guide(named), seed), named)
        assert not message.get("content", "").strip()
        (call,) = message["tool_calls"]
        arguments = json.loads(call["function"]["arguments"])
        assert call["function"]["name"] == "patch" and A_PATCH.fullmatch(arguments["input"]), arguments


def test_text_and_json_are_arguments_of_one_answer(tiny_model_path: Path) -> None:
    model, auto = Model(tiny_model_path, "json_tools"), request("auto", TEXT_TOOLS)
    patch = '*** Begin Patch\n*** Add File: a.b\n+say "x"\n*** End Patch'
    call = f'<tool_call>\n{{"name": "patch"}}\n{patch}\n</tool_call>'
    both = f"I do.\n{call}\n<tool_call>\n{VALID}\n</tool_call>"
    for text in ("Hello!", call, both):
        assert model.accepts(model.guide(auto), text), text
    assert not model.accepts(model.guide(auto), call.replace("+say", "say"))
    calls = [each["function"] for each in model.message(both, auto)["tool_calls"]]
    assert [each["name"] for each in calls] == ["patch", "weather"]
    assert json.loads(calls[0]["arguments"]) == {"input": patch}
