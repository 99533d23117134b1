"""The answers: clicks at coordinates that are multiples of a step, so that each is one of a few tokens."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from scripts.ui_micro.scenes import Element, Scene

_ANSWER: Final = re.compile(r"click\(start_box='\((\d+),(\d+)\)'\)")


@dataclass(frozen=True, slots=True)
class AnswerFormat:
    """How a model writes coordinates.

    Attributes:
        step: coordinates are multiples of it.
        maximum: the largest coordinate with a token of its own.
        relative: whether they are thousandths of width and height instead of pixels.
    """

    step: int
    maximum: int
    relative: bool = False

    @property
    def coordinates(self) -> range:
        """All coordinates with a token of their own."""
        return range(0, self.maximum + 1, self.step)

    def answer(self, element: Element, scene: Scene) -> str:
        """Return the answer that clicks the centre of an element."""
        x, y = (
            round(part * scale / self.step) * self.step
            for part, scale in zip(element.centre, self._scales(scene), strict=True)
        )
        return f"click(start_box='({x},{y})')"

    def clicked(self, text: str, scene: Scene) -> tuple[float, float] | None:
        """Parse an answer; return its coordinates in pixels of the scene, or None if it is not a click."""
        if match := _ANSWER.fullmatch(text.strip()):
            x_scale, y_scale = self._scales(scene)
            return int(match[1]) / x_scale, int(match[2]) / y_scale
        return None

    def _scales(self, scene: Scene) -> tuple[float, float]:
        return (1000 / scene.width, 1000 / scene.height) if self.relative else (1, 1)


PIXELS: Final = AnswerFormat(step=4, maximum=280)
THOUSANDTHS: Final = AnswerFormat(step=25, maximum=1000, relative=True)
