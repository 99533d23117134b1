"""Chat templates render as with transformers, and cannot leave the sandbox."""

from __future__ import annotations

import json
from typing import Any

import pytest
from jinja2 import TemplateError
from jinja2.exceptions import SecurityError
from transformers.utils.chat_template_utils import render_jinja_template

from shared.tokenizing.chat_template import CannotContinue, OutputTooLong, render
from tests.support.chat_templates import ALL, ASK, CALL, RESULT, TOOL
from tests.support.tokenizers import CHATML

TURNS: list[dict[str, Any]] = [
    {"role": "system", "content": "Be <kind> & brief."},
    {"role": "user", "content": [{"type": "text", "text": "é 🙂"}, {"type": "image"}]},
    {"role": "assistant", "content": "Yes", "reasoning": "I think", "tool_calls": None},
    {"role": "user", "content": "  spaces  "},
]
TEMPLATES = [
    CHATML,
    "{%- for m in messages -%}\n  {% if loop.first %}\n   {{ bos_token }}\n {% endif %}\n {{ m }}\n{%- endfor %}",
    "{{ messages | tojson(indent=2) }}{{ messages[0] | tojson(sort_keys=true, separators=(',', ':')) }}",
    "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.role }}{% break %}{% endfor %}",
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "{% set ns = namespace(n=0, self=1) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "{{ dict(a=1, **dict.fromkeys(['b'], 2)) }}{{ dict.mro is defined }}",
    "{{ messages[2].reasoning_content }}{{ messages[2].thinking }}{{ messages[2].tool_calls is defined }}",
    "{{ tools is none }}{{ documents is none }}{{ enable_thinking }}{{ unknown is defined }}{{ pad_token }}",
    "{{ strftime_now('%Y') }}",
    "{{ messages[1].content | selectattr('type', 'equalto', 'image') | list | length }}",
    "{% macro m(x) %}<{{ x | trim | upper }}>{% endmacro %}{{ m(messages[3].content) }}\n",
]
VARIABLES = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "enable_thinking": False}


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("generation", [True, False])
def test_output_equals_that_of_transformers(template: str, generation: bool) -> None:
    # transformers drops nulls before it calls this function.
    messages = [{name: value for name, value in turn.items() if value is not None} for turn in TURNS]
    [expected], _ = render_jinja_template(
        [messages], chat_template=template, add_generation_prompt=generation, **VARIABLES
    )
    assert render(template, TURNS, VARIABLES, add_generation_prompt=generation) == expected


@pytest.mark.parametrize("template", ALL.values(), ids=ALL)
@pytest.mark.parametrize("tools", [None, [TOOL]])
def test_tools_and_tool_calls_equal_those_of_transformers(template: str, tools: list[Any] | None) -> None:
    call = {**CALL, "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    messages = [ASK, {"role": "assistant", "content": "", "tool_calls": [call]}, {**RESULT, "name": "weather"}]
    [expected], _ = render_jinja_template(
        [messages], tools=tools, chat_template=template, add_generation_prompt=True, **VARIABLES
    )
    assert render(template, messages, VARIABLES, tools=tools, add_generation_prompt=True) == expected


@pytest.mark.parametrize(
    "template", [*TEMPLATES[:3], *ALL.values(), "{{ messages[-1].content | upper }}", "no", "content"]
)
@pytest.mark.parametrize(
    "content", ["It is", " It is \n", "", [{"type": "text", "text": "It "}, {"type": "image"}], []]
)
def test_a_continued_message_equals_that_of_transformers(template: str, content: Any) -> None:
    messages = [ASK, {"role": "assistant", "content": content}]
    options = {"add_generation_prompt": False, **VARIABLES}
    try:
        [expected], _ = render_jinja_template(
            [messages], chat_template=template, continue_final_message=True, **options
        )
    except ValueError:
        with pytest.raises(CannotContinue):
            render(template, messages, VARIABLES, add_generation_prompt=False, continue_final=True)
    except TypeError:  # the template needs a text
        with pytest.raises(TypeError):
            render(template, messages, VARIABLES, add_generation_prompt=False, continue_final=True)
    else:
        assert render(template, messages, VARIABLES, add_generation_prompt=False, continue_final=True) == expected


def rendered(template: str, **options: Any) -> str:
    return render(template, TURNS, VARIABLES, add_generation_prompt=True, **options)


def test_template_may_reject_messages() -> None:
    with pytest.raises(TemplateError, match="roles must alternate") as caught:
        rendered("{{ raise_exception('roles must alternate') }}")
    assert type(caught.value) is TemplateError
    with pytest.raises(ValueError, match="at least one message"):
        render(CHATML, [], {}, add_generation_prompt=True)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ namespace(_x=1) }}",
        "{% set n = namespace() %}{% set n.__class__ = 1 %}",
        "{{ messages.__class__.mro() }}",
        "{{ '{0.__class__.x}'.format(1) }}",
        "{{ strftime_now.__globals__.os }}",
    ],
)
def test_template_cannot_leave_the_sandbox(template: str) -> None:
    with pytest.raises(SecurityError):
        rendered(template)


def test_output_length_is_limited() -> None:
    assert rendered("{% for n in range(10) %}xxxxx{% endfor %}", max_characters=50) == "x" * 50
    with pytest.raises(OutputTooLong):
        rendered("{% for n in range(10) %}xxxxx{% endfor %}", max_characters=49)


def test_json_is_not_escaped_for_html() -> None:
    assert rendered("{{ messages[0].content | tojson }}") == json.dumps("Be <kind> & brief.")
