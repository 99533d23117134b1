"""Synthetic screenshots are reproducible, and each instruction matches exactly one element."""

from __future__ import annotations

import random

import pytest

from scripts.ui_micro.drawing import draw
from scripts.ui_micro.evaluation import FIRST_HELD_OUT, Trial, held_out
from scripts.ui_micro.instructions import Attributes, Instruction, answer, clicked, instructions, is_unique, phrases
from scripts.ui_micro.scenes import SIZES, make_scene
from scripts.ui_micro.tokenizer import END, SPECIAL, make_tokenizer

SCENES = [make_scene(seed) for seed in range(200)]


def test_a_seed_makes_the_same_scene_and_the_same_picture() -> None:
    assert [make_scene(seed) for seed in range(200)] == SCENES
    assert draw(SCENES[0]).tobytes() == draw(make_scene(0)).tobytes()
    assert len({draw(scene).tobytes() for scene in SCENES}) == len(SCENES)


def test_elements_are_inside_and_apart() -> None:
    for scene in SCENES:
        assert (scene.width, scene.height) in SIZES
        assert scene.width % 28 == scene.height % 28 == 0, "or the processor would resize it"
        for element in scene.elements:
            left, top, right, bottom = element.box
            assert 0 <= left < right <= scene.width
            assert 0 <= top < bottom <= scene.height
        middles = [(scene, element.centre) for element in scene.elements]
        assert all(sum(e.contains(*middle) for e in scene.elements) == 1 for scene, middle in middles)


def test_an_instruction_fits_one_element_and_its_answer_clicks_it() -> None:
    for scene in SCENES:
        for instruction in instructions(scene, random.Random(1), 6):
            named = [
                attributes for _, phrase, attributes in phrases(instruction.target) if instruction.text.endswith(phrase)
            ]
            assert any(is_unique(attributes, instruction.target, scene.elements) for attributes in named), instruction
            place = clicked(answer(instruction.target))
            assert place is not None
            assert instruction.target.contains(*place)


def test_the_colour_decides_where_it_shall() -> None:
    deciding = 0
    for scene in SCENES:
        for instruction in instructions(scene, random.Random(1), 6, by_colour=1.0):
            without = [(key, value) for key, value in attributes_of(instruction) if key != "colour"]
            assert instruction.by_colour is not is_unique(without, instruction.target, scene.elements)
            deciding += instruction.by_colour
    assert deciding > 4 * len(SCENES), "some scenes have nothing of the kind"


def attributes_of(instruction: Instruction) -> Attributes:
    return next(
        attributes
        for _, phrase, attributes in phrases(instruction.target)
        if instruction.text.partition(" ")[2] == phrase
    )


@pytest.mark.parametrize(
    "text", ["", "click", "click(start_box='(1,2')", "type(content='x')", "click(start_box='(a,b)')"]
)
def test_what_is_no_click_hits_nothing(text: str) -> None:
    assert clicked(text) is None
    scene = SCENES[0]
    assert not Trial(scene, instructions(scene, random.Random(1), 1)[0]).hit(text)


def test_held_out_screenshots_are_none_of_the_trainings() -> None:
    trials = list(held_out(20))
    assert all(trial.scene == make_scene(FIRST_HELD_OUT + i) for i, trial in enumerate(trials))
    assert not {trial.png for trial in trials} & {Trial(scene, trials[0].instruction).png for scene in SCENES}


def test_the_tokenizer_knows_its_words_and_can_spell_all_others() -> None:
    tokenizer = make_tokenizer()
    assert tokenizer.get_vocab_size() < 1000
    encoded = tokenizer.encode(f"click(start_box='(84,60)'){END}")
    assert len(encoded.ids) == 6
    for text in ("click the red Save button", "drück den Knopf 🙂", "日本語", "  \n\t "):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert [tokenizer.id_to_token(number) for number in range(len(SPECIAL))] == list(SPECIAL)
