"""What one may be told to click in a scene, and the answer that is right."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
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
    by_colour: bool
    """Whether the colour decides: without it, something else would fit as well."""


def instructions(scene: Scene, rng: random.Random, count: int, *, by_colour: float = 0.0) -> list[Instruction]:
    """That many for the scene, with other targets as far as there are some.

    Args:
        by_colour: how many of them, between 0 and 1, shall be such that the colour decides, as far as there are some.
    """
    all_ways = [(target, _ways(scene, target, is_unique)) for target in scene.elements]
    coloured = [(target, ways) for target in scene.elements if (ways := _ways(scene, target, needs_colour))]
    rng.shuffle(all_ways)
    rng.shuffle(coloured)
    told = []
    for i in range(count):
        among = coloured if coloured and rng.random() < by_colour else all_ways
        target, ways = among[i % len(among)]
        form, phrase, fits = rng.choice(ways)
        decides = needs_colour(fits, target, scene.elements)
        told.append(Instruction(f"{rng.choice(VERBS)} {phrase}", form, target, decides))
    return told


def answer(element: Element) -> str:
    """A click on the middle of the element."""
    x, y = (round(part / GRID) * GRID for part in element.centre)
    return f"click(start_box='({x},{y})')"


def clicked(text: str) -> tuple[int, int] | None:
    """The place that an answer names; None when it is no click."""
    if found := _ANSWER.fullmatch(text.strip()):
        return int(found[1]), int(found[2])
    return None


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


def _ways(
    scene: Scene, target: Element, will_do: Callable[[Fits, Element, Sequence[Element]], bool]
) -> list[tuple[str, str, Fits]]:
    """Those of a target's phrases whose attributes will do."""
    return [each for each in phrases(target) if will_do(each[2], target, scene.elements)]


def needs_colour(fits: Fits, target: Element, elements: Sequence[Element]) -> bool:
    """Whether the attributes fit the target alone, but without the colour something else as well."""
    others = [(key, value) for key, value in fits if key != "colour"]
    return is_unique(fits, target, elements) and not is_unique(others, target, elements)


def is_unique(fits: Fits, target: Element, elements: Sequence[Element]) -> bool:
    """Whether the attributes fit the target alone."""
    return [e for e in elements if all(getattr(e, key) == value for key, value in fits)] == [target]
