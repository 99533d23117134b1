"""Templates give what transformers gives."""

from __future__ import annotations

import json
from typing import Any

import pytest
from jinja2 import TemplateError
from jinja2.exceptions import SecurityError
from transformers.utils.chat_template_utils import render_jinja_template

from shared.tokenizing.chat_template import TooMuchText, render
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
def test_templates_render_as_transformers_renders_them(template: str, generation: bool) -> None:
    # What transformers does to messages before it calls this.
    given = [{name: value for name, value in turn.items() if value is not None} for turn in TURNS]
    [told], _ = render_jinja_template([given], chat_template=template, add_generation_prompt=generation, **VARIABLES)
    assert render(template, TURNS, VARIABLES, add_generation_prompt=generation) == told


def said(template: str, **more: Any) -> str:
    return render(template, TURNS, VARIABLES, add_generation_prompt=True, **more)


def test_a_template_may_refuse() -> None:
    with pytest.raises(TemplateError, match="roles must alternate") as caught:
        said("{{ raise_exception('roles must alternate') }}")
    assert type(caught.value) is TemplateError
    with pytest.raises(ValueError, match="without messages"):
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
def test_a_template_does_not_escape(template: str) -> None:
    with pytest.raises(SecurityError):
        said(template)


def test_what_a_template_writes_is_bounded() -> None:
    assert said("{% for n in range(10) %}xxxxx{% endfor %}", most_bytes=50) == "x" * 50
    with pytest.raises(TooMuchText):
        said("{% for n in range(10) %}xxxxx{% endfor %}", most_bytes=49)


def test_json_is_not_escaped_for_html() -> None:
    assert said("{{ messages[0].content | tojson }}") == json.dumps("Be <kind> & brief.")
