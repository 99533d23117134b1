"""Small chat templates, each in the style of a family of models: they differ in how they write tools and reasoning."""

from __future__ import annotations

from typing import Any, Final

QWEN: Final = """\
{%- if tools %}{{- '<|im_start|>system\\n' }}
{%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{% endif %}
{{- '# Tools' }}{% for tool in tools %}{{- '\\n' ~ (tool | tojson) }}{% endfor %}
{{- '\\nAnswer with <tool_call></tool_call>.<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}{% endif %}
{%- for message in messages %}
{%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- elif message.role == 'assistant' %}
{%- set content = message.content if message.content is string else '' %}
{%- set reasoning = message.reasoning_content if message.reasoning_content is string else '' %}
{%- if '</think>' in content %}
{%- set reasoning = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}
{{- '<|im_start|>assistant\\n' }}
{%- if loop.last and reasoning %}{{- '<think>\\n' + reasoning + '\\n</think>\\n\\n' }}{% endif %}
{{- content }}
{%- for call in message.tool_calls or [] %}
{{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' + (call.function.arguments | tojson) }}
{{- '}\\n</tool_call>' }}{% endfor %}{{- '<|im_end|>\\n' }}
{%- elif message.role == 'tool' %}
{{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"""  # noqa: E501
"""Arguments as JSON of an object, tools in the system message, `enable_thinking`."""

THINKING: Final = QWEN.removesuffix("{% endif %}{% endif %}") + "{% else %}{{- '<think>\\n' }}{% endif %}{% endif %}"
"""Prompts end with the beginning of the thoughts, and earlier thoughts are left out."""

DEEPSEEK: Final = """\
{{- bos_token }}{% if not thinking is defined %}{% set thinking = false %}{% endif %}
{%- for message in messages %}
{%- if message.role == 'system' %}{{ message.content }}{% if tools %}{{ tools | length }} tools{% endif %}
{%- elif message.role == 'user' %}{{ '<|user|>' + message.content }}
{%- elif message.role == 'tool' %}{{ '<|result|>' + message.content }}
{%- else %}{{ '<|assistant|>' + message.content }}
{%- for call in message.tool_calls or [] %}{{ '<|call|>' + call.function.name + ' ' + call.function.arguments }}{% endfor %}
{{- eos_token }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% if thinking %}{{ '<think>' }}{% endif %}{% endif %}"""  # noqa: E501
"""Arguments are text that is concatenated, `content` is always needed, `thinking`."""

PRINTING: Final = """\
{% for message in messages %}[{{ message.role }}] {{ message.content }}
{%- for call in message.tool_calls or [] %} {{ call.function.name }}({{ call.function.arguments }}){% endfor %}
{%- if message.name %} by {{ message.name }}{% endif %} {% endfor %}{% if tools %}tools{% endif %}"""
"""Arguments are printed as they are, and the names of functions with their results."""

LLAMA: Final = """\
{{- bos_token }}{% for message in messages %}<|start|>{{ message.role }}<|end|>
{{- message.content | trim }}<|eot|>{% endfor %}{% if add_generation_prompt %}<|start|>assistant<|end|>{% endif %}"""
"""White space is removed. No tools."""

GPT: Final = """\
{{- '<|start|>system<|message|>Reasoning: ' + (reasoning_effort or 'medium') + '<|end|>' }}
{%- for message in messages %}
{%- if message.role in ('developer', 'system') %}{{ '<|start|>developer<|message|>' + message.content + '<|end|>' }}
{%- elif message.role == 'tool' %}{{ '<|start|>functions.' + message.name + '<|message|>' + message.content|tojson + '<|end|>' }}
{%- elif message.role == 'assistant' %}
{%- if message.thinking %}{{ '<|start|>assistant<|channel|>analysis<|message|>' + message.thinking + '<|end|>' }}{% endif %}
{%- for call in message.tool_calls or [] %}
{{- '<|start|>assistant to=functions.' + call.function.name + '<|message|>' + call.function.arguments|tojson + '<|call|>' }}
{%- endfor %}
{%- if message.content %}{{ '<|start|>assistant<|channel|>final<|message|>' + message.content + '<|return|>' }}{% endif %}
{%- else %}{{ '<|start|>user<|message|>' + message.content + '<|end|>' }}{% endif %}{% endfor %}
{%- if tools %}{{ tools | tojson }}{% endif %}
{%- if add_generation_prompt %}<|start|>assistant{% endif %}"""  # noqa: E501
"""The role `developer`, channels, `reasoning_effort`, `thinking` in messages."""

PARTS: Final = """\
{% for message in messages %}<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}
{%- for part in message.content %}{% if part.type == 'image' %}<|image|>{% else %}{{ part.text }}{% endif %}{% endfor %}
{%- endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
"""Parts of a message are joined without a space."""

ALL: Final = {
    "qwen": QWEN, "deepseek": DEEPSEEK, "printing": PRINTING, "llama": LLAMA, "gpt": GPT, "parts": PARTS,
}  # fmt: skip
SPECIAL: Final = (
    *("<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>", "<|call|>", "<|result|>", "<|start|>", "<|end|>"),
    *("<|eot|>", "<|message|>", "<|channel|>", "<|return|>", "<|image|>", "<s>", "</s>"),
)
"""Special tokens of these templates."""
MARKERS: Final = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
"""Added tokens that are not special: a tokenizer writes them into the text."""
VARIABLES: Final = {"bos_token": "<s>", "eos_token": "</s>"}

TOOL: Final[dict[str, Any]] = {
    "type": "function",
    "function": {"name": "weather", "description": "It's <sunny>", "parameters": {"type": "object", "properties": {}}},
}
CALL: Final[dict[str, Any]] = {
    "id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Köln", "days": [1, null]}'},
}  # fmt: skip
ASK: Final = {"role": "user", "content": "Rain in Köln?"}
CALLED: Final = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT: Final = {"role": "tool", "tool_call_id": "c1", "content": "12 °C"}
