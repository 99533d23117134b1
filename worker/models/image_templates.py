"""Chat templates of vision models, so that one token stands for each image.

Some processors of mlx-vlm replace other text in a rendered prompt. Here prompts are tokenised before images are read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from jinja2 import Environment

_TEXTS: Final[Mapping[str, tuple[str, str]]] = {
    # The processor writes line breaks around an image, which merge with those of the template.
    "gemma3": ("<start_of_image>", "\n\n<start_of_image>\n\n"),
    "internvl_chat": ("<image>", "<IMG_CONTEXT>"),
}
"""By `model_type`, what a template writes for an image, and what it should write."""


def for_images(folder: Path, template: str) -> str:
    """Return the chat template of a vision model's folder with the text that stands for an image."""
    config = json.loads((folder / "config.json").read_bytes())
    texts = _TEXTS.get(config.get("model_type"))
    return template if texts is None else rewritten(template, *texts)


def rewritten(template: str, text: str, new: str) -> str:
    """Replace a text in what a chat template writes, in the literals of its expressions and outside of them."""
    literal = json.dumps(new)
    replacements = {"data": f"{{{{ {literal} }}}}", "string": literal[1:-1]}
    tokens = Environment(autoescape=True).lex(template)
    return "".join(value.replace(text, replacements.get(kind, text)) for _, kind, value in tokens)
