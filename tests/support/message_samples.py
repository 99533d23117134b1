"""Answers in every format of reasoning and tool calls, and tokenizers that declare these formats."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from worker.output.format import MessageFormat, message_format
from worker.output.parser import Delta, MessageParser, merged, message_parser

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "list_files",
            "parameters": {"type": "object", "properties": {"path": {"type": "string"}}},
        },
    },
]
WEATHER = ("get_weather", {"city": "Paris", "days": 3})
FILES = ("list_files", {"path": "/tmp/a b"})
_WEATHER_JSON = '{"city": "Paris", "days": 3}'
_FILES_JSON = '{"path": "/tmp/a b"}'


@dataclass(frozen=True)
class Sample:
    """An answer in one format of tool calls: a call of `get_weather`, then one of `list_files`.

    Attributes:
        name: the module of `mlx_lm.tool_parsers`, or `harmony`.
        template: a chat template by which mlx-lm recognises the format.
        calls: the two calls as a model writes them.
        special: special tokens of the tokenizer.
        config: further fields of `tokenizer_config.json`.
        defaults: what mlx-lm's model class declares for its tokenizers.
        think: what surrounds reasoning; empty if the model does not reason.
        message: what surrounds content.
    """

    name: str
    template: str
    calls: str
    special: tuple[str, ...] = ()
    config: dict[str, Any] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)
    think: tuple[str, str] = ("<think>", "</think>")
    message: tuple[str, str] = ("", "")

    def answer(self, reasoning: str = "", content: str = "", *, calls: bool = True) -> str:
        """Return an answer with these parts."""
        parts = [
            *([self.think[0] + reasoning + self.think[1]] if reasoning else []),
            *([self.message[0] + content + self.message[1]] if content else []),
            *([self.calls] if calls else []),
        ]
        return ("" if self.message[0] else "\n").join(parts)

    def write(self, folder: Path) -> Path:
        """Write a tokenizer of bytes that has the tokens and the template of the format."""
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_tokens([AddedToken(each, special=False) for each in self.think if each.startswith("<")])
        tokenizer.add_special_tokens(["<eos>", "<|turn|>", *self.special])
        tokenizer.save(str(folder / "tokenizer.json"))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "chat_template": self.template}
        (folder / "tokenizer_config.json").write_text(json.dumps(config | self.config))
        return folder

    def tokenizer(self, folder: Path) -> Any:
        """Return mlx-lm's wrapper of the tokenizer."""
        from mlx_lm import tokenizer_utils

        return tokenizer_utils.load(self.write(folder), defaults=self.defaults)

    def form(self, folder: Path) -> MessageFormat:
        """Return the format that the tokenizer declares."""
        return message_format(self.tokenizer(folder))


def _arguments(prefix: str) -> str:
    """Return the arguments of `get_weather` as GLM writes them."""
    pairs = (("city", "Paris"), ("days", 3))
    return "".join(
        f"<{prefix}key>{key}</{prefix}key>\n<{prefix}value>{value}</{prefix}value>\n" for key, value in pairs
    )


_GLM = (
    f"<tool_call>get_weather\n{_arguments('arg_')}</tool_call>\n"
    "<tool_call>list_files\n<arg_key>path</arg_key>\n<arg_value>/tmp/a b</arg_value>\n</tool_call>"
)
_HARMONY_SPECIAL = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|constrain|>", "<|call|>", "<|return|>")
_XTML_SPECIAL = ("<|open|>", "<|close|>", "<|sep|>", "<|end_of_msg|>")
_KIMI_K2_SPECIAL = tuple(
    f"<|tool_call{name}|>" for name in ("s_section_begin", "s_section_end", "_begin", "_end", "_argument_begin")
)

SAMPLES = [
    Sample(
        "json_tools",
        "<tool_call> {{ tool_call.name }}",
        f'<tool_call>\n{{"name": "get_weather", "arguments": {_WEATHER_JSON}}}\n</tool_call>\n'
        f'<tool_call>\n{{"name": "list_files", "arguments": {_FILES_JSON}}}\n</tool_call>',
    ),
    Sample(
        "function_gemma",
        "<start_function_call>",
        "<start_function_call>call:get_weather{city:<escape>Paris<escape>,days:3}<end_function_call>"
        "<start_function_call>call:list_files{path:<escape>/tmp/a b<escape>}<end_function_call>",
    ),
    Sample(
        "gemma4",
        "<|tool_call> <tool_call|>",
        '<|tool_call>call:get_weather{city:<|"|>Paris<|"|>,days:3}<tool_call|>'
        '<|tool_call>call:list_files{path:<|"|>/tmp/a b<|"|>}<tool_call|>',
        special=("<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", '<|"|>'),
        think=("<|channel>thought\n", "<channel|>"),
    ),
    Sample("glm47", "<arg_key>", _GLM),
    Sample("laguna", "", _GLM, config={"tool_parser_type": "laguna"}),
    Sample(
        "kimi_k2",
        "<|tool_calls_section_begin|>",
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
        f"{_WEATHER_JSON}<|tool_call_end|><|tool_call_begin|>functions.list_files:1<|tool_call_argument_begin|>"
        f"{_FILES_JSON}<|tool_call_end|><|tool_calls_section_end|>",
        special=_KIMI_K2_SPECIAL,
    ),
    Sample(
        "kimi_k3",
        "",
        '<|open|>tools<|sep|><|open|>call tool="get_weather" index="1"<|sep|>'
        '<|open|>argument key="city" type="string"<|sep|>Paris<|close|>argument<|sep|>'
        '<|open|>argument key="days" type="integer"<|sep|>3<|close|>argument<|sep|><|close|>call<|sep|>'
        f'<|open|>call tool="list_files" index="2"<|sep|><|open|>json type="object"<|sep|>{_FILES_JSON}'
        "<|close|>json<|sep|><|close|>call<|sep|><|close|>tools<|sep|>",
        special=_XTML_SPECIAL,
        think=("<|open|>think<|sep|>", "<|close|>think<|sep|>"),
        message=("<|open|>response<|sep|>", "<|close|>response<|sep|>"),
    ),
    Sample(
        "longcat",
        "<longcat_tool_call>",
        f"<longcat_tool_call>get_weather\n{_arguments('longcat_arg_')}</longcat_tool_call>\n"
        "<longcat_tool_call>list_files\n<longcat_arg_key>path</longcat_arg_key>\n"
        "<longcat_arg_value>/tmp/a b</longcat_arg_value>\n</longcat_tool_call>",
        think=("<longcat_think>", "</longcat_think>"),
    ),
    Sample(
        "minicpm5",
        '<function name=" <param name="',
        '<function name="get_weather"><param name="city">Paris</param><param name="days">3</param></function>\n'
        '<function name="list_files"><param name="path"><![CDATA[/tmp/a b]]></param></function>',
    ),
    Sample(
        "minimax_m2",
        "<minimax:tool_call>",
        '<minimax:tool_call>\n<invoke name="get_weather">\n<parameter name="city">Paris</parameter>\n'
        '<parameter name="days">3</parameter>\n</invoke>\n<invoke name="list_files">\n'
        '<parameter name="path">/tmp/a b</parameter>\n</invoke>\n</minimax:tool_call>',
    ),
    Sample(
        "mistral",
        "[TOOL_CALLS]",
        f"[TOOL_CALLS]get_weather[ARGS]{_WEATHER_JSON}[TOOL_CALLS]list_files[ARGS]{_FILES_JSON}",
        special=("[TOOL_CALLS]", "[ARGS]"),
    ),
    Sample(
        "muse_spark",
        "<atem:function_calls>",
        'to=tools<atem:function_calls><atem:invoke name="get_weather">'
        '<atem:parameter name="city">Paris</atem:parameter>'
        '<atem:parameter name="days">3</atem:parameter></atem:invoke><atem:invoke name="list_files">'
        '<atem:parameter name="path">/tmp/a b</atem:parameter></atem:invoke></atem:function_calls>',
        special=("<|message|>", "<|eom|>", "<|eot|>"),
        defaults={"chat_template_type": "muse_spark"},
        think=("to=self<|message|>", "<|eom|>"),
        message=("to=user<|message|>", "<|eom|>"),
    ),
    Sample(
        "pythonic",
        "<|tool_call_start|>",
        '<|tool_call_start|>[get_weather(city="Paris", days=3), list_files(path="/tmp/a b")]<|tool_call_end|>',
        special=("<|tool_call_start|>", "<|tool_call_end|>"),
        think=("<|think:start|>", "<|think:end|>"),
    ),
    Sample(
        "qwen3_coder",
        "<tool_call>\n<function=",
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n<parameter=days>\n3\n</parameter>\n"
        "</function>\n</tool_call>\n<tool_call>\n<function=list_files>\n<parameter=path>\n/tmp/a b\n</parameter>\n"
        "</function>\n</tool_call>",
    ),
    Sample(
        "harmony",
        "",
        "<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>"
        f"{_WEATHER_JSON}<|end|><|start|>assistant to=functions.list_files<|channel|>commentary json<|message|>"
        f"{_FILES_JSON}<|end|>",
        special=_HARMONY_SPECIAL,
        think=("<|channel|>analysis<|message|>", "<|end|><|start|>assistant"),
        message=("<|channel|>final<|message|>", "<|end|><|start|>assistant"),
    ),
]


def parser_for(
    form: MessageFormat, *, tools: bool = True, parallel: bool = True, prompt: Sequence[int] = ()
) -> MessageParser:
    """Return a parser for an answer."""
    return message_parser(form, prompt, TOOLS if tools else (), "job_1", parallel_calls=parallel)


def parsed(parser: MessageParser, pieces: Sequence[str]) -> Delta:
    """Return the message of an answer that comes in pieces."""
    return merged([*map(parser.push, pieces), parser.finish()])


def calls_of(message: Delta) -> list[tuple[str, Any]]:
    """Return the name and the arguments of each call."""
    functions = [call["function"] for call in message.get("tool_calls", ())]
    return [(function["name"], json.loads(function["arguments"])) for function in functions]
