"""Evaluates how often the model clicks the right element, from PNG bytes through mlx-vlm's processor and generate."""

from __future__ import annotations

import importlib
import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from scripts.ui_micro.answers import AnswerFormat
from scripts.ui_micro.drawing import draw
from scripts.ui_micro.instructions import Instruction, instructions
from scripts.ui_micro.scenes import Scene, make_scene

FIRST_HELD_OUT = 10**9
"""Training uses only seeds below this one."""
MAX_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Trial:
    """A screenshot and an instruction."""

    scene: Scene
    instruction: Instruction

    @property
    def png(self) -> bytes:
        """The screenshot as a PNG file."""
        file = BytesIO()
        draw(self.scene).save(file, "PNG")
        return file.getvalue()

    def hit(self, answer: str, answers: AnswerFormat) -> bool:
        """Return whether the answer, in this format, is a click inside the target element."""
        place = answers.clicked(answer, self.scene)
        return place is not None and self.instruction.target.contains(*place)


def held_out(count: int, first: int = 0, *, by_colour: float = 0.0) -> Iterator[Trial]:
    """Generate trials that are not in the training data, always the same ones; see `instructions`."""
    for seed in range(FIRST_HELD_OUT + first, FIRST_HELD_OUT + first + count):
        scene = make_scene(seed)
        yield Trial(scene, instructions(scene, random.Random(seed), 1, by_colour=by_colour)[0])


@dataclass(frozen=True, slots=True)
class Score:
    """Number of hits and trials."""

    hits: int
    trials: int

    @property
    def share(self) -> float:
        """Share of hits, from 0 to 1."""
        return self.hits / self.trials if self.trials else 0.0

    def __str__(self) -> str:
        return f"{self.share:6.1%} ({self.hits} of {self.trials})"


def evaluate(predict: Callable[[bytes, str], str], answers: AnswerFormat, trials: Iterator[Trial]) -> dict[str, Score]:
    """Return scores of all trials, and by kind of target and form of the instruction."""
    hits: dict[str, list[bool]] = defaultdict(list)
    for trial in trials:
        hit = trial.hit(predict(trial.png, trial.instruction.text), answers)
        needs_colour = ["needs colour"] if trial.instruction.by_colour else []
        for group in ("all", trial.instruction.target.kind, trial.instruction.form, *needs_colour):
            hits[group].append(hit)
    return {group: Score(sum(hits[group]), len(hits[group])) for group in sorted(hits)}


def prompt_for(processor: Any, text: str) -> str:
    """Return the prompt for one image and an instruction."""
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}
    prompt: str = processor.tokenizer.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
    return prompt


def load_predictor(folder: Path) -> Callable[[bytes, str], str]:
    """Load the model of a folder in mlx-vlm; return a function from PNG and instruction to answer."""
    library: Any = importlib.import_module("mlx_vlm")
    model, processor = library.load(str(folder))

    def predict(png: bytes, text: str) -> str:
        prompt = prompt_for(processor, text)
        image: Any = [Image.open(BytesIO(png))]
        answer: str = library.generate(
            model, processor, prompt, image=image, temperature=0.0, max_tokens=MAX_TOKENS
        ).text
        return answer

    return predict
