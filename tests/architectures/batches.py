"""Rows of a random model in a batch, compared with mlx-lm's own loop for one prompt."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step

from shared.models.registry import ModelCard
from tests.support.architecture_configs import VOCABULARY, config
from tests.support.runner import resumed, row, step
from worker.models.load import LoadedModel
from worker.runner.base import Row
from worker.runner.batching.support import BatchingSupport, Together
from worker.runner.memory import Memory
from worker.runner.model_runner import MLXRunner

ANY, EQUAL_LENGTHS, ONE_BY_ONE = Together
CHUNK = 64
LENGTHS = (3, 17, 50, 9, 33, 17)
TOKENS = 12
TOLERANCE, TOLERANCE_SHORT = 1e-3, 0.1
"""Differences of log-probabilities that are rounding, in float32 and in shorter types."""
CUT = 5
"""Tokens after which a row is removed, and continues as another one."""

NO_PADDING_BEHIND = BatchingSupport(EQUAL_LENGTHS, ANY)
ALONE = BatchingSupport(ONE_BY_ONE, ONE_BY_ONE)
RESTRICTED = {
    **dict.fromkeys(("baichuan_m1", "bailing_moe_linear", "jamba", "longcat_flash_ngram", "mamba"), NO_PADDING_BEHIND),
    **dict.fromkeys(("nemotron_h", "olmo_hybrid", "recurrent_gemma", "rwkv7"), NO_PADDING_BEHIND),
    "afm7": BatchingSupport(EQUAL_LENGTHS, EQUAL_LENGTHS),
    "minimax_m3_vl": BatchingSupport(ANY, EQUAL_LENGTHS),
    # The mask does not fit keys that several heads share.
    "gemma2": ALONE,
    "phi3small": replace(ALONE, continues=False),
    # Its window is a token longer in a prompt than behind it.
    "plamo3": BatchingSupport(continues=False),
    "deepseek_v41": ALONE,
    "gpt_bigcode": ALONE,
    "llama4": ALONE,
}
"""Architectures of which mlx-lm does not batch all rows. The last three were not served at all."""


@dataclass
class Answer:
    """Tokens of a row, and what the model thought of each."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


def compare_all(
    name: str, model: Any, batching: BatchingSupport, tolerance: float = TOLERANCE, *, cut: Sequence[int] = (0, 2)
) -> None:
    """Compare rows that join a batch one after another with the same rows alone.

    Args:
        cut: rows that are removed once, and continue.
    """
    rows = rows_of(LENGTHS)
    answers = together(runner_of(name, model, batching), rows, cut)
    for each in rows:
        compare(model, each.prompt, answers[each.uid], tolerance)


def rows_of(lengths: Sequence[int]) -> list[Row]:
    """Return rows with random prompts."""
    draw = random.Random(3)
    prompts = [[draw.randrange(VOCABULARY) for _ in range(length)] for length in lengths]
    return [row(uid, prompt, TOKENS, owner="me", logprobs=0) for uid, prompt in enumerate(prompts)]


def loaded_model(name: str, model: Any) -> LoadedModel:
    """Return a model as if it came from a folder."""
    card = ModelCard(name, "text", 100_000, vocabulary=config(name)["vocab_size"])
    return LoadedModel(model, None, config(name), card, frozenset())


def runner_of(name: str, model: Any, found: BatchingSupport) -> MLXRunner:
    """Return a runner with a prefix cache and speculation."""
    return MLXRunner(loaded_model(name, model), CHUNK, Memory(2**30, 2**28), batching=found, speculation_tokens=4)


def together(runner: MLXRunner, rows: Sequence[Row], cut: Sequence[int]) -> dict[int, Answer]:
    """Run three rows at once and the others joining them; those of `cut` are removed once and continue."""
    answers: dict[int, Answer] = defaultdict(Answer)
    alias = {each.uid: each.uid for each in rows}
    waiting = list(rows[3:])
    runner.insert(rows[:3])
    steps = 0
    while any(len(answers[each.uid].tokens) < TOKENS for each in rows):
        if steps % 2 and waiting:
            runner.insert([waiting.pop(0)])
        output = step(runner)
        assert not output.failed
        for each in output.tokens:
            answer = answers[alias[each.uid]]
            answer.tokens.append(each.token)
            assert each.logprob is not None
            answer.logprobs.append(each.logprob)
            if len(answer.tokens) == CUT and each.uid in cut:
                runner.remove([each.uid])
                alias[each.uid + 100] = each.uid
                runner.insert([resumed(rows[each.uid], each.uid + 100, answer.tokens)])
        steps += 1
        assert steps < 300
    runner.close()
    return answers


def compare(model: Any, prompt: Sequence[int], answer: Answer, tolerance: float) -> None:
    """Compare with mlx-lm's own loop, up to a choice between tokens that are equally probable."""
    expected = generate_step(mx.array(list(prompt)), model, max_tokens=len(answer.tokens))
    for (token, logprobs), said, logprob in zip(expected, answer.tokens, answer.logprobs, strict=True):
        assert logprobs[said].item() == pytest.approx(logprob, abs=tolerance)
        assert (logprobs[int(token)] <= logprobs[said] + tolerance).item()
        if said != int(token):
            break
