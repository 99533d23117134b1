"""A stack for the console: a model that answers from a script, a vision model, and a background process."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from shared.settings import ROOT
from tests.plugins.stack import Stack, catalog_stack
from tests.support.clients import tool_call
from tests.support.waiting import eventually

CATALOG: Final = f"""
default = "chat-demo"
[models.chat-demo]
path = "{{models}}/chat-demo"
aliases = ["chat"]
[models.code-demo]
path = "{{models}}/code-demo"
aliases = ["coder"]
[models.ui-micro]
path = "{ROOT}/models/ui-micro"
"""
LIGHTHOUSE: Final = (
    "<think>\nThe reader wants a short explanation. Light, lens, rotation, and why it blinks. Keep it concrete.\n"
    "</think>\n\n"
    "A lighthouse sends one narrow beam instead of light in all directions.\n\n"
    "1. The lamp stands in the focus of a Fresnel lens, whose rings bend the light into a beam.\n"
    "2. The lens turns on a bed of mercury or on rollers, so the beam sweeps the horizon.\n"
    "3. Each station has its own rhythm, so that a sailor can tell it from its neighbours.\n"
)
NUMBERS: Final = " ".join(map(str, range(200)))
SCRIPT: Final[list[dict[str, Any]]] = [
    {"match": "lighthouse", "text": LIGHTHOUSE, "directives": "!every=0.02"},
    {"match": "slowly", "text": f"<think>\nCount.\n</think>\n\n{NUMBERS}", "directives": "!every=0.03"},
    {"match": "weather", "text": f"I look it up.\n{tool_call('weather', city='Oslo')}"},
    {"match": "12 degrees", "text": "It is 12 degrees in Oslo."},
    {"match": "fail", "text": "This answer breaks off.", "directives": "!row-fails=2"},
    {"text": "The queue keeps every job, even if the worker that runs it dies.", "directives": "!every=0.005"},
]


@contextmanager
def console_stack(*, background: bool = True, **variables: str) -> Iterator[Stack]:
    """Start the API, a worker with the scripted model and, by default, a background process."""
    with tempfile.TemporaryDirectory(prefix="mlxq-") as folder:
        script = Path(folder) / "script.jsonl"
        script.write_text("".join(json.dumps(line) + "\n" for line in SCRIPT))
        for model in ("chat-demo", "code-demo"):
            (Path(folder) / model).mkdir()
            (Path(folder) / model / "config.json").write_text("{}")
        overrides = {"BACKEND": "scripted", "SCRIPT_FILE": str(script), **variables}
        with catalog_stack(CATALOG.replace("{models}", folder), **overrides) as stack:
            if background:
                stack.start_background()
            stack.start_worker(WORKER_MODELS="chat-demo")
            yield stack


def start_vision_worker(stack: Stack) -> None:
    """Start a worker with the vision model, which is real."""
    stack.spawn_worker(BACKEND="auto", WORKER_MODELS="ui-micro")
    eventually(lambda: len(stack.ready_workers()) == 2, "the vision model is loaded", 120)
