"""What one may be told to click in a scene, and the answer that is right."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from scripts.ui_micro.scenes import Element, Scene

VERBS = ("click", "press", "tap", "select")
GRID = 4
"""Answers are multiples of this many pixels: so each coordinate is one of a few tokens."""

_ANSWER = re.compile(r"click\(start_box='\((\d+),(\d+)\)'\)")


@dataclass(frozen=True, slots=True)
class Instruction:
    """An instruction that exactly one element of its scene fits."""

    text: str
    form: str
    """How it names the element: `colour and name`, `name`, `name alone`, `colour`, `state and name`."""
    target: Element


def instructions(scene: Scene, rng: random.Random, count: int, *, by_colour_alone: bool = False) -> list[Instruction]:
    """That many for the scene, with other targets as far as there are some.

    Args:
        by_colour_alone: whether some name nothing but kind and colour.
    """
    targets = list(scene.elements)
    rng.shuffle(targets)
    return [_instruction(scene, targets[i % len(targets)], rng, by_colour_alone) for i in range(count)]


def answer(element: Element) -> str:
    """A click on the middle of the element."""
    x, y = (round(part / GRID) * GRID for part in element.centre)
    return f"click(start_box='({x},{y})')"


def clicked(text: str) -> tuple[int, int] | None:
    """The place that an answer names; None when it is no click."""
    if found := _ANSWER.fullmatch(text.strip()):
        return int(found[1]), int(found[2])
    return None


def _instruction(scene: Scene, target: Element, rng: random.Random, by_colour_alone: bool) -> Instruction:
    told = [each for each in phrases(target) if by_colour_alone or each[0] != "colour"]
    form, phrase, _ = rng.choice([each for each in told if is_unique(each[2], target, scene.elements)])
    return Instruction(f"{rng.choice(VERBS)} {phrase}", form, target)


Fits = Sequence[tuple[str, object]]


def phrases(element: Element) -> Iterator[tuple[str, str, Fits]]:
    """Ways to name an element: the form, the words, and which of its attributes they tell."""
    kind, name = ("kind", element.kind), ("name", element.name)
    if element.kind == "field":
        state = "filled" if element.filled else "empty"
        yield "state and name", f"the {state} {element.name} field", (kind, name, ("filled", element.filled))
    else:
        colour = ("colour", element.colour)
        yield "colour and name", f"the {element.colour} {element.name} {element.kind}", (kind, name, colour)
        yield "colour", f"the {element.colour} {element.kind}", (kind, colour)
    yield "name", f"the {element.name} {element.kind}", (kind, name)
    yield "name alone", element.name, (name,)


def is_unique(fits: Fits, target: Element, elements: Sequence[Element]) -> bool:
    """Whether the attributes fit the target alone."""
    return [e for e in elements if all(getattr(e, key) == value for key, value in fits)] == [target]
