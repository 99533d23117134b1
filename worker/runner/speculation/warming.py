"""Measures decode steps and verifying passes during warm-up; see `PassCost`."""

from __future__ import annotations

from collections.abc import Generator
from functools import partial
from typing import Any

import mlx.core as mx

from shared.jobs.request import Request, Sampling
from worker.runner import forward
from worker.runner.base import Row
from worker.runner.cost import PrefillCost
from worker.runner.decode import DecodeBatch
from worker.runner.decode_row import DecodeRow
from worker.runner.kv_cache import KVCache
from worker.runner.prefill_cost import shortest_seconds
from worker.runner.sampler import BatchSampler
from worker.runner.speculation.draft_model import DraftModelProposer
from worker.runner.speculation.pass_cost import PassCost
from worker.runner.speculation.verification import Speculation

_PROMPT = (0,) * 9


def measure_passes(
    model: Any, speculation: Speculation, batch: DecodeBatch, cost: PrefillCost
) -> Generator[None, None, PassCost]:
    """Measure plain and verifying steps of one row.

    Args:
        batch: an empty batch.
        cost: cost of prefill, which includes the cost of attention.

    Yields:
        None, before each step.

    Returns:
        The cost.
    """
    cache = KVCache.empty(model)
    forward.fill(model, cache, [_PROMPT[:-1]])
    batch.join([Row(-1, Request("", 1000, Sampling(temperature=0.0)), _PROMPT, 0, 1000)], cache)
    batch.step()
    seconds = {1: (yield from shortest_seconds(batch.step))}
    batch.read()
    for length in speculation.lengths:
        seconds[1 + length] = yield from shortest_seconds(partial(batch.verify, length))
    batch.clear()
    speculation.drop([-1])
    speculation.drafted = speculation.accepted = 0
    sampling = yield from _sampling_seconds(model, speculation.lengths[-1])
    return PassCost(seconds, sampling, cost.attention)


def measure_draft(draft: DraftModelProposer) -> Generator[None, None, None]:
    """Measure how long the draft model takes to draft a token.

    Yields:
        None, before each run.
    """
    length = 4
    row = DecodeRow.after_prefill(Row(-1, Request("", 1000, Sampling(temperature=0.0)), _PROMPT, 0, 1000))
    draft.token_s = (yield from shortest_seconds(partial(draft.propose, [row], length))) / length
    draft.drop([-1])


def _sampling_seconds(model: Any, rows: int) -> Generator[None, None, float]:
    """Measure the additional seconds per token to sample with a temperature instead of greedily."""
    vocabulary = model(mx.array([[0]], dtype=mx.uint32), cache=KVCache.empty(model).layers).shape[-1]
    logits = mx.zeros((rows, vocabulary))
    seconds = []
    for temperature in (0.0, 1.0):
        sampler = BatchSampler([Sampling(temperature=temperature)] * rows)
        seconds.append((yield from shortest_seconds(partial(_sample, sampler, logits))))
    return max(seconds[1] - seconds[0], 0.0) / rows


def _sample(sampler: BatchSampler, logits: mx.array) -> None:
    mx.eval(sampler(logits, range(logits.shape[0])))
