"""Measures what a decode step and a verifying pass take, while the model warms; see `PassCost`."""

from __future__ import annotations

from collections.abc import Generator
from functools import partial
from typing import Any

import mlx.core as mx

from shared.jobs.request import Request, Sampling
from worker.runner import forward
from worker.runner.base import PrefillCost, Row
from worker.runner.decode import DecodeBatch
from worker.runner.kv_cache import KVCache
from worker.runner.prefill_cost import measured
from worker.runner.sampler import BatchSampler
from worker.runner.speculation.pass_cost import PassCost
from worker.runner.speculation.verification import Speculation

_PROMPT = (0,) * 9


def measuring(
    model: Any, speculation: Speculation, batch: DecodeBatch, cost: PrefillCost
) -> Generator[None, None, PassCost]:
    """Run plain and verifying steps of one row; in pieces.

    Args:
        batch: an empty one.
        cost: of prefill, for what attending to a long context takes.
    """
    cache = KVCache.empty(model)
    forward.fill(model, cache, [_PROMPT[:-1]])
    batch.join([Row(-1, Request("", 1000, Sampling(temperature=0.0)), _PROMPT, 0, 1000)], cache)
    batch.step()
    seconds = {1: (yield from measured(batch.step))}
    batch.read()
    for length in speculation.lengths:
        seconds[1 + length] = yield from measured(partial(batch.verify, length))
    batch.clear()
    speculation.drop([-1])
    speculation.drafted = speculation.accepted = 0
    drawn = yield from _drawn(model, speculation.lengths[-1])
    return PassCost(seconds, drawn, cost.behind)


def _drawn(model: Any, rows: int) -> Generator[None, None, float]:
    """Seconds of sampling a token with a temperature, beyond those of a greedy choice."""
    vocabulary = model(mx.array([[0]], dtype=mx.uint32), cache=KVCache.empty(model).layers).shape[-1]
    logits = mx.zeros((rows, vocabulary))
    took = []
    for temperature in (0.0, 1.0):
        sampler = BatchSampler([Sampling(temperature=temperature)] * rows)
        took.append((yield from measured(partial(_sample, sampler, logits))))
    return max(took[1] - took[0], 0.0) / rows


def _sample(sampler: BatchSampler, logits: mx.array) -> None:
    mx.eval(sampler(logits, range(logits.shape[0])))
