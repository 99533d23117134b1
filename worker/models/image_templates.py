"""Chat templates of vision models, so that one token stands for each image.

Some processors of mlx-vlm replace other text in a rendered prompt. Here prompts are tokenised before images are read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from jinja2 import Environment

_TEXTS: Final[Mapping[str, tuple[str, str]]] = {
    # The processor writes line breaks around an image, which merge with those of the template.
    "gemma3": ("<start_of_image>", "\n\n<start_of_image>\n\n"),
    "internvl_chat": ("<image>", "<IMG_CONTEXT>"),
}
"""By `model_type`, what a template writes for an image, and what it should write."""
_DEEPSEEK_OCR: Final = (
    "{{ bos_token }}{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n"
    "{% if grounding %}<|grounding|>{% endif %}{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{% endfor %}"
)
"""Writes the texts as they are, as the model was trained. `grounding` asks for the positions of what is read: the token
for it would be ordinary text in a message."""
_DEFAULTS: Final[Mapping[str, str]] = dict.fromkeys(("deepseekocr", "deepseekocr_2"), _DEEPSEEK_OCR)
"""By `model_type`, the template of folders that have none for images."""


def for_images(folder: Path, template: Any) -> Any:
    """Return the chat template of a vision model's folder with the text that stands for an image.

    Args:
        template: the folder's; None if it has none. Several templates are returned as they are.
    """
    kind = json.loads((folder / "config.json").read_bytes()).get("model_type")
    if kind in _DEFAULTS and (template is None or (isinstance(template, str) and "image" not in template)):
        return _DEFAULTS[kind]
    texts = _TEXTS.get(kind)
    return rewritten(template, *texts) if texts is not None and isinstance(template, str) else template


def rewritten(template: str, text: str, new: str) -> str:
    """Replace a text in what a chat template writes, in the literals of its expressions and outside of them."""
    literal = json.dumps(new)
    replacements = {"data": f"{{{{ {literal} }}}}", "string": literal[1:-1]}
    tokens = Environment(autoescape=True).lex(template)
    return "".join(value.replace(text, replacements.get(kind, text)) for _, kind, value in tokens)
