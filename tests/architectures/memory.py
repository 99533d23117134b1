"""The memory that is predicted for the caches of rows, compared with what they hold."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.architectures.batches import RESTRICTED, loaded_model
from tests.architectures.kinds import Kind, kind_of
from tests.architectures.reuse import prompt_of
from tests.support.architectures import make
from tests.support.runner import row, step
from worker.runner.batching.support import UNRESTRICTED
from worker.runner.memory import Memory
from worker.runner.model_runner import MLXRunner

TOLERANCE = 0.05
STEPS = 6
_LATER = 1000
"""More tokens than a row generates here: it stays in the batch."""

BATCHES: tuple[tuple[list[int], int | None], ...] = (
    ([20], None),
    ([300], None),
    ([300] * 6, None),
    ([3, 17, 50, 9, 33, 17], None),
    ([300] * 4, 128),
    ([600] * 4, 512),
)
"""Lengths of the prompts, and the length of sliding windows; None: the shortest one."""


def check_memory(name: str, _folder: Path) -> None:
    """The prediction is within 5 % of what the rows hold; just before their caches grow, it includes that."""
    for lengths, window in BATCHES:
        model = make(name, sliding_window=window) if window else make(name)
        predicted, held = _measure(name, model, lengths)
        if kind_of(model) is Kind.OTHER:  # caches that are not shown are estimated by their growth
            assert predicted >= (1 - TOLERANCE) * held
        else:
            assert abs(predicted / held - 1) <= TOLERANCE, (lengths, window, predicted, held)
    predicted, held = _measure(name, make(name), [700])
    assert held <= (1 + TOLERANCE) * predicted
    assert predicted <= 1.5 * held or kind_of(make(name)) is Kind.OTHER


def _measure(name: str, model: Any, lengths: Sequence[int]) -> tuple[int, int]:
    """Return the predicted and the held bytes of rows that have decoded a few tokens."""
    memory = Memory(2**30, 0)
    support = RESTRICTED.get(name, UNRESTRICTED)
    runner = MLXRunner(loaded_model(name, model), 64, memory, batching=support)
    runner.insert([row(uid, prompt_of(length), _LATER) for uid, length in enumerate(lengths)])
    generated = [0] * len(lengths)
    while min(generated) < STEPS:
        output = step(runner)
        assert not output.failed
        for each in output.tokens:
            generated[each.uid] += 1
    now = [length + tokens for length, tokens in zip(lengths, generated, strict=True)]
    return runner.batch_bytes(now), int(runner.stats()["kv_bytes"])
