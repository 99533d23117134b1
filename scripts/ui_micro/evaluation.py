"""How often the model clicks the right thing, asked the way a client asks: PNG bytes, processor, mlx-vlm's generate."""

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

from scripts.ui_micro.drawing import draw
from scripts.ui_micro.instructions import Instruction, clicked, instructions
from scripts.ui_micro.scenes import Scene, make_scene

FIRST_HELD_OUT = 10**9
"""Seeds from here on are never trained on."""
MOST_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Trial:
    """A screenshot and what is asked about it."""

    scene: Scene
    instruction: Instruction

    @property
    def png(self) -> bytes:
        """The screenshot as a client would send it."""
        file = BytesIO()
        draw(self.scene).save(file, "PNG")
        return file.getvalue()

    def hit(self, answer: str) -> bool:
        """Whether the answer is a click inside the element that was asked for."""
        place = clicked(answer)
        return place is not None and self.instruction.target.contains(*place)


def held_out(count: int, first: int = 0, *, by_colour: float = 0.0) -> Iterator[Trial]:
    """Trials that no training has seen, the same ones each time; see `instructions`."""
    for seed in range(FIRST_HELD_OUT + first, FIRST_HELD_OUT + first + count):
        scene = make_scene(seed)
        yield Trial(scene, instructions(scene, random.Random(seed), 1, by_colour=by_colour)[0])


@dataclass(frozen=True, slots=True)
class Score:
    """Hits of so many trials."""

    hits: int
    trials: int

    @property
    def share(self) -> float:
        """Between 0 and 1."""
        return self.hits / self.trials if self.trials else 0.0

    def __str__(self) -> str:
        return f"{self.share:6.1%} ({self.hits} of {self.trials})"


def evaluate(ask: Callable[[bytes, str], str], trials: Iterator[Trial]) -> dict[str, Score]:
    """Scores by what is clicked and how it is named, and of all."""
    hits: dict[str, list[bool]] = defaultdict(list)
    for trial in trials:
        hit = trial.hit(ask(trial.png, trial.instruction.text))
        decides = ["colour decides"] if trial.instruction.by_colour else []
        for group in ("all", trial.instruction.target.kind, trial.instruction.form, *decides):
            hits[group].append(hit)
    return {group: Score(sum(hits[group]), len(hits[group])) for group in sorted(hits)}


def asker(folder: Path) -> Callable[[bytes, str], str]:
    """Asks the model of a folder through mlx-vlm."""
    library: Any = importlib.import_module("mlx_vlm")
    model, processor = library.load(str(folder))

    def ask(png: bytes, text: str) -> str:
        prompt = library.apply_chat_template(processor, model.config, text, num_images=1)
        image: Any = [Image.open(BytesIO(png))]
        answer: str = library.generate(
            model, processor, prompt, image=image, temperature=0.0, max_tokens=MOST_TOKENS
        ).text
        return answer

    return ask
