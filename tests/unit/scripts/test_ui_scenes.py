"""Synthetic screenshots are reproducible, and each instruction matches exactly one element."""

from __future__ import annotations

import random

import pytest

from scripts.ui_micro.answers import PIXELS, THOUSANDTHS, AnswerFormat
from scripts.ui_micro.architectures.architecture import Architecture
from scripts.ui_micro.architectures.gemma import GEMMA
from scripts.ui_micro.architectures.qwen import QWEN
from scripts.ui_micro.drawing import draw
from scripts.ui_micro.evaluation import FIRST_HELD_OUT, Trial, held_out
from scripts.ui_micro.instructions import Attributes, Instruction, instructions, is_unique, phrases
from scripts.ui_micro.scenes import SIZES, make_scene
from scripts.ui_micro.tokenizer import make_tokenizer

SCENES = [make_scene(seed) for seed in range(200)]


def test_the_same_seed_gives_the_same_image() -> None:
    assert [make_scene(seed) for seed in range(200)] == SCENES
    assert draw(SCENES[0]).tobytes() == draw(make_scene(0)).tobytes()
    assert len({draw(scene).tobytes() for scene in SCENES}) == len(SCENES)


def test_elements_are_inside_the_page_and_do_not_overlap() -> None:
    for scene in SCENES:
        assert (scene.width, scene.height) in SIZES
        assert scene.width % 28 == scene.height % 28 == 0, "the processor must not resize it"
        for element in scene.elements:
            left, top, right, bottom = element.box
            assert 0 <= left < right <= scene.width
            assert 0 <= top < bottom <= scene.height
        centres = [(scene, element.centre) for element in scene.elements]
        assert all(sum(e.contains(*centre) for e in scene.elements) == 1 for scene, centre in centres)


@pytest.mark.parametrize("answers", [PIXELS, THOUSANDTHS])
def test_an_instruction_fits_one_element_and_its_answer_clicks_it(answers: AnswerFormat) -> None:
    for scene in SCENES:
        for instruction in instructions(scene, random.Random(1), 6):
            named = [
                attributes for _, phrase, attributes in phrases(instruction.target) if instruction.text.endswith(phrase)
            ]
            assert any(is_unique(attributes, instruction.target, scene.elements) for attributes in named), instruction
            place = answers.clicked(answers.answer(instruction.target, scene), scene)
            assert place is not None
            assert instruction.target.contains(*place)


def test_instructions_need_the_colour_if_requested() -> None:
    needing_colour = 0
    for scene in SCENES:
        for instruction in instructions(scene, random.Random(1), 6, by_colour=1.0):
            without = [(key, value) for key, value in attributes_of(instruction) if key != "colour"]
            assert instruction.by_colour is not is_unique(without, instruction.target, scene.elements)
            needing_colour += instruction.by_colour
    assert needing_colour > 4 * len(SCENES), "a few scenes have no such element"


def attributes_of(instruction: Instruction) -> Attributes:
    return next(
        attributes
        for _, phrase, attributes in phrases(instruction.target)
        if instruction.text.partition(" ")[2] == phrase
    )


@pytest.mark.parametrize(
    "text", ["", "click", "click(start_box='(1,2')", "type(content='x')", "click(start_box='(a,b)')"]
)
def test_an_answer_that_is_not_a_click_hits_nothing(text: str) -> None:
    scene = SCENES[0]
    assert PIXELS.clicked(text, scene) is None
    assert not Trial(scene, instructions(scene, random.Random(1), 1)[0]).hit(text, PIXELS)


def test_evaluation_screenshots_are_not_in_the_training_data() -> None:
    trials = list(held_out(20))
    assert all(trial.scene == make_scene(FIRST_HELD_OUT + i) for i, trial in enumerate(trials))
    assert not {trial.png for trial in trials} & {Trial(scene, trials[0].instruction).png for scene in SCENES}


@pytest.mark.parametrize("architecture", [QWEN, GEMMA], ids=lambda each: each.name)
def test_the_tokenizer_has_tokens_for_its_words_and_bytes_for_others(architecture: Architecture) -> None:
    tokenizer, special = make_tokenizer(architecture), architecture.tokens.special
    assert tokenizer.get_vocab_size() < 1000
    encoded = tokenizer.encode(f"click(start_box='(100,200)'){architecture.tokens.end}")
    assert len(encoded.ids) == 6
    for text in ("click the red Save button", "drück den Knopf 🙂", "日本語", "  \n\t "):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert [tokenizer.id_to_token(number) for number in range(len(special))] == list(special)
