"""Drives a model runner with images, without the engine and a tokenizer process."""

from __future__ import annotations

import hashlib
import io
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from shared.jobs.request import Request, Sampling
from tests.support.runner import GREEDY, step
from worker.runner.base import Prompt, Row
from worker.runner.model_runner import MLXRunner

TOKENS = 24


class ImageFiles(dict[str, bytes]):
    """Contents of image files by digest, as the worker gets them."""

    def part(self, width: int, height: int, seed: int) -> dict[str, Any]:
        """Add an image of coloured squares that depend on the seed, and return the message part that names it."""
        dots = np.random.default_rng(seed).integers(0, 255, (height // 16 + 1, width // 16 + 1, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(dots).resize((width, height), Image.Resampling.NEAREST).save(file, "PNG")
        digest = hashlib.sha256(file.getvalue()).hexdigest()
        self[digest] = file.getvalue()
        return {"type": "image", "image": digest, "width": width, "height": height}


def ask(text: str, *images: dict[str, Any], sampling: Sampling = GREEDY) -> Request:
    """Return a request with images, given by their message parts, before the text."""
    content = [*images, {"type": "text", "text": text}] if images else text
    return Request("m", TOKENS, sampling, messages=({"role": "user", "content": content},))


def prompt_of(runner: MLXRunner, request: Request, files: ImageFiles) -> Prompt:
    """Tokenise a request like a tokenizer process, and return the runner's prompt."""
    assert request.messages is not None
    messages = [{**message, "content": template_parts(message["content"])} for message in request.messages]
    tokens = runner._tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    return runner.prompt(tokens, 0, request, files)


def template_parts(content: Any) -> Any:
    """Return the message parts for the chat template, which reads only the type of an image part."""
    if isinstance(content, str):
        return content
    return [{"type": "image"} if part["type"] == "image" else part for part in content]


def row(prompt: Prompt, request: Request, uid: int, owner: str | None = None) -> Row:
    return Row(uid, request, prompt.tokens, 0, request.max_tokens, owner, media=prompt.media)


def run(runner: MLXRunner, rows: Sequence[Row], every: int = 0) -> tuple[dict[int, list[int]], dict[int, int]]:
    """Step until all rows have generated all their tokens.

    Args:
        every: insert one row per this many steps; 0: insert all rows at once.

    Returns:
        By uid, the generated tokens, and the number of reused prompt tokens.
    """
    tokens: dict[int, list[int]] = defaultdict(list)
    reused: dict[int, int] = {}
    waiting, steps = list(rows), 0
    while any(len(tokens[each.uid]) < each.max_new_tokens for each in rows):
        while waiting and (not every or steps % every == 0):
            runner.insert([waiting.pop(0)])
            if every:
                break
        output = step(runner)
        assert not output.failed
        reused |= output.prefilled
        for each in output.tokens:
            tokens[each.uid].append(each.token)
        steps += 1
        assert steps < 3000
    return tokens, reused


def answer(runner: MLXRunner, request: Request, files: ImageFiles, owner: str | None = None) -> list[int]:
    """Run a single row and return its tokens."""
    prompt = prompt_of(runner, request, files)
    return run(runner, [row(prompt, request, 1, owner)])[0][1]
