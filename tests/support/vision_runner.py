"""Drives a runner with images, without tokenizing helper and engine."""

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


class Pictures(dict[str, bytes]):
    """Files by digest, as the worker gets them; and the parts of messages that name them."""

    def part(self, width: int, height: int, seed: int) -> dict[str, Any]:
        """A picture of coloured squares; another seed gives another."""
        dots = np.random.default_rng(seed).integers(0, 255, (height // 16 + 1, width // 16 + 1, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(dots).resize((width, height), Image.Resampling.NEAREST).save(file, "PNG")
        digest = hashlib.sha256(file.getvalue()).hexdigest()
        self[digest] = file.getvalue()
        return {"type": "image", "image": digest, "width": width, "height": height}


def ask(text: str, *images: dict[str, Any], sampling: Sampling = GREEDY) -> Request:
    content = [*images, {"type": "text", "text": text}] if images else text
    return Request("m", TOKENS, sampling, messages=({"role": "user", "content": content},))


def prompt_of(runner: MLXRunner, asked: Request, files: Pictures) -> Prompt:
    """As the tokenizing helper gives it to the runner."""
    assert asked.messages is not None
    messages = [{**message, "content": parts(message["content"])} for message in asked.messages]
    tokens = runner._tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    return runner.prompt(tokens, 0, asked, files)


def parts(content: Any) -> Any:
    """Templates know images by the type of their part alone."""
    if isinstance(content, str):
        return content
    return [{"type": "image"} if part["type"] == "image" else part for part in content]


def row(prompt: Prompt, asked: Request, uid: int, owner: str | None = None) -> Row:
    return Row(uid, asked, prompt.tokens, 0, asked.max_tokens, owner, media=prompt.media)


def run(runner: MLXRunner, rows: Sequence[Row], every: int = 0) -> tuple[dict[int, list[int]], dict[int, int]]:
    """Step until all have all their tokens; a row joins `every` so many steps. Tokens, and how many were reused."""
    said: dict[int, list[int]] = defaultdict(list)
    reused: dict[int, int] = {}
    waiting, steps = list(rows), 0
    while any(len(said[each.uid]) < each.max_new_tokens for each in rows):
        while waiting and (not every or steps % every == 0):
            runner.insert([waiting.pop(0)])
            if every:
                break
        output = step(runner)
        assert not output.failed
        reused |= output.prefilled
        for each in output.tokens:
            said[each.uid].append(each.token)
        steps += 1
        assert steps < 3000
    return said, reused


def answer(runner: MLXRunner, asked: Request, files: Pictures, owner: str | None = None) -> list[int]:
    prompt = prompt_of(runner, asked, files)
    return run(runner, [row(prompt, asked, 1, owner)])[0][1]
