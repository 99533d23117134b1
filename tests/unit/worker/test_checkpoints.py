"""Where the prefill of a prompt takes checkpoints of recurrent layers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer

pytest.importorskip("mlx_lm")

from shared.tokenizing.chat_template import render
from tests.support.chat_templates import MARKERS
from tests.support.runner import row
from worker.output.format import MessageFormat
from worker.runner.kv_segments import Layout
from worker.runner.prefix.blocks import BLOCK
from worker.runner.prefix.checkpoints import INTERVAL, MIN_DISTANCE, SMALL_STATE_BYTES, TAIL, stops
from worker.runner.prefix.tree import common_length

LARGE = Layout(None, (2,), (2,), (None,), 16, 0, SMALL_STATE_BYTES + 1)
SMALL = replace(LARGE, state_bytes=SMALL_STATE_BYTES)
END, START, STOP = 7, 8, 9
CHAT = """\
{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}<|im_start|>assistant
"""


def prompt(length: int, *ends: int) -> list[int]:
    """Return a prompt whose messages end after these numbers of tokens."""
    return [END if i + 1 in ends else 100 + i for i in range(length)]


def test_a_short_prompt_has_a_checkpoint_before_the_tail_of_its_template() -> None:
    assert stops(row(1, prompt(100)), LARGE, 0, 0) == [100 - TAIL]
    assert stops(row(1, prompt(20)), LARGE, 0, 0) == []
    continued = replace(row(1, prompt(150)), generated=50)
    assert stops(continued, LARGE, 0, 0) == [100 - TAIL]


def test_the_end_of_the_first_message_and_a_difference_from_earlier_prompts_are_checkpoints() -> None:
    one = row(1, prompt(500, 120, 300, 480))
    assert stops(one, LARGE, 0, 250, [END, 9]) == [120, 250, 500 - TAIL]
    assert stops(one, LARGE, 120, 250, [END]) == [250, 500 - TAIL]
    assert stops(replace(one, shared=130), LARGE, 0, 0) == [130, 500 - TAIL]


def test_long_prompts_have_regular_checkpoints() -> None:
    length = 2 * INTERVAL + 500
    assert stops(row(1, prompt(length)), LARGE, 0, 0) == [INTERVAL, 2 * INTERVAL, length - TAIL]
    assert stops(row(1, prompt(length)), LARGE, INTERVAL + 5, 0) == [2 * INTERVAL, length - TAIL]
    assert stops(row(1, prompt(3 * BLOCK)), SMALL, 0, 0) == [BLOCK, 2 * BLOCK, 3 * BLOCK - TAIL]


def test_checkpoints_close_to_the_reused_prefix_do_not_pay() -> None:
    one = row(1, prompt(100))
    assert stops(one, LARGE, 100 - TAIL - MIN_DISTANCE, 0) == [100 - TAIL]
    assert stops(one, LARGE, 100 - TAIL - MIN_DISTANCE + 1, 0) == []


@pytest.mark.parametrize("answer", ["Yes.", "\nYes.", "\n\nYes."])
@pytest.mark.parametrize("ending", ["", "<think>\n", "<think>", "</think>", "<think>\n\n</think>\n\n"])
def test_the_next_turn_repeats_the_tokens_up_to_the_last_checkpoint(
    tiny_model_path: Path, ending: str, answer: str
) -> None:
    """The template writes the thoughts, or what begins them, only where an answer begins."""
    tokenizer = Tokenizer.from_file(str(tiny_model_path / "tokenizer.json"))
    tokenizer.add_tokens([*MARKERS])
    start, end, *turns = map(tokenizer.token_to_id, ("<think>", "</think>", "<|im_start|>", "<|im_end|>"))
    form = MessageFormat(think_start=(start,), think_end=(end,), turn_tokens=frozenset(turns))

    def tokens(*texts: str) -> list[int]:
        messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
        text = render(CHAT + "{{ ending }}", messages, {"ending": ending}, add_generation_prompt=True)
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    first, second = tokens("Is it raining in Rome or Paris?"), tokens("Is it raining in Rome or Paris?", answer, "Why?")
    last = max(stops(row(1, first), LARGE, 0, 0, turns, form), default=len(first) - 1)
    assert first[:last] == second[:last]
    assert last >= common_length(first, second) - 1
    assert bool(ending) == (last < len(first) - 1)


@pytest.mark.parametrize(
    ("end", "dropped"),
    [
        ((90, START, 5), 3),
        ((90, START, 5, STOP), 4),
        ((90, 5, STOP), 2),
        ((START, 90, 5), 0),  # in an earlier message
        ((5, 6), 0),
    ],
)
def test_markers_of_thoughts_are_the_tail_of_a_template(end: tuple[int, ...], dropped: int) -> None:
    form = MessageFormat(think_start=(START,), think_end=(STOP,), turn_tokens=frozenset({90}))
    found = stops(row(1, [*prompt(100), *end]), LARGE, 0, 0, [], form)
    assert found == ([100 + len(end) - dropped] if dropped else [])
