"""Instructions to click an element of a scene."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from scripts.ui_micro.scenes import Element, Scene

VERBS = ("click", "press", "tap", "select")


@dataclass(frozen=True, slots=True)
class Instruction:
    """An instruction that exactly one element of its scene matches."""

    text: str
    form: str
    """How it describes the element: `colour and name`, `name`, `name alone`, `colour`, `state and name`."""
    target: Element
    by_colour: bool
    """Whether the colour is needed: without it, another element would match too."""


def instructions(scene: Scene, rng: random.Random, count: int, *, by_colour: float = 0.0) -> list[Instruction]:
    """Draw `count` instructions for a scene, with different targets if possible.

    Args:
        by_colour: share of instructions that need the colour, from 0 to 1, if the scene has any.
    """
    all_targets = [(target, _matching_phrases(scene, target, is_unique)) for target in scene.elements]
    coloured = [
        (target, found) for target in scene.elements if (found := _matching_phrases(scene, target, needs_colour))
    ]
    rng.shuffle(all_targets)
    rng.shuffle(coloured)
    drawn = []
    for i in range(count):
        candidates = coloured if coloured and rng.random() < by_colour else all_targets
        target, choices = candidates[i % len(candidates)]
        form, phrase, attributes = rng.choice(choices)
        by_colour_alone = needs_colour(attributes, target, scene.elements)
        drawn.append(Instruction(f"{rng.choice(VERBS)} {phrase}", form, target, by_colour_alone))
    return drawn


Attributes = Sequence[tuple[str, object]]


def phrases(element: Element) -> Iterator[tuple[str, str, Attributes]]:
    """Generate descriptions of an element: form, words, and the attributes that they mention."""
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


def _matching_phrases(
    scene: Scene, target: Element, matches: Callable[[Attributes, Element, Sequence[Element]], bool]
) -> list[tuple[str, str, Attributes]]:
    """Return the descriptions of a target whose attributes satisfy a condition."""
    return [phrase for phrase in phrases(target) if matches(phrase[2], target, scene.elements)]


def needs_colour(attributes: Attributes, target: Element, elements: Sequence[Element]) -> bool:
    """Whether only the target has the attributes, but without the colour other elements have them too."""
    others = [(key, value) for key, value in attributes if key != "colour"]
    return is_unique(attributes, target, elements) and not is_unique(others, target, elements)


def is_unique(attributes: Attributes, target: Element, elements: Sequence[Element]) -> bool:
    """Whether only the target has the attributes."""
    return [each for each in elements if all(getattr(each, key) == value for key, value in attributes)] == [target]
