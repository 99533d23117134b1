"""Drives a model runner without the engine: prefills every row as soon as possible, and decodes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from shared.jobs.request import Request, Sampling
from shared.models.catalog import load_catalog
from shared.settings import Settings
from worker.runner.base import EncodeWork, ModelRunner, PrefillWork, Row, StepOutput, StepPlan

GREEDY = Sampling(temperature=0.0)


def row(
    uid: int,
    prompt: Sequence[int],
    max_new_tokens: int = 12,
    sampling: Sampling = GREEDY,
    owner: str | None = None,
    logprobs: int | None = None,
) -> Row:
    """Return a new row."""
    request = Request("m", max_new_tokens, sampling, logprobs=logprobs)
    return Row(uid, request, tuple(prompt), 0, max_new_tokens, owner)


def numbered(
    uid: int,
    length: int,
    max_new_tokens: int = 12,
    sampling: Sampling = GREEDY,
    owner: str | None = None,
    logprobs: int | None = None,
) -> Row:
    """Return a row with a prompt of `length` tokens that depends on the uid."""
    prompt = [(uid * 977 + i * 131) % 40_000 + 100 for i in range(length)]
    return row(uid, prompt, max_new_tokens, sampling, owner, logprobs)


def resumed(row: Row, uid: int, output: Sequence[int]) -> Row:
    """Return a row that continues after the tokens that `row` has generated."""
    remaining = row.max_new_tokens - len(output)
    return replace(row, uid=uid, prompt=(*row.prompt, *output), generated=len(output), max_new_tokens=remaining)


def plan(runner: ModelRunner, *, layers: int | None = None, ahead: bool = True) -> StepPlan:
    """Plan a step, in the order of insertion: several short prompts together, or a chunk of a long one.

    Args:
        layers: number of layers per step for chunks; None: all.
        ahead: see `StepPlan`.
    """
    remaining = runner.prefillable()
    encode = EncodeWork() if runner.next_image_s() is not None else None
    short = [uid for uid, each in remaining.items() if each.tokens <= 2 * runner.chunk and not each.in_progress]
    first = next(iter(remaining), None)
    work = None
    if first is not None:
        work = PrefillWork(tuple(short[:8])) if first in short else PrefillWork((first,), runner.chunk, layers)
    return StepPlan(work, encode, speculate=not remaining and encode is None, ahead=ahead)


def step(runner: ModelRunner, *, layers: int | None = None, ahead: bool = True) -> StepOutput:
    """Plan and execute a step."""
    return runner.execute(plan(runner, layers=layers, ahead=ahead))


def run(
    runner: ModelRunner,
    rows: Sequence[Row],
    joins: Callable[[int], Iterable[Row]] = lambda _: (),
    *,
    layers: int | None = None,
    ahead: Callable[[int], bool] = lambda _: True,
) -> dict[int, list[int]]:
    """Step until every row has generated all its tokens.

    Args:
        joins: returns the rows to insert before step n, given n.
        layers: see `plan`.
        ahead: returns whether step n runs ahead, given n.

    Returns:
        Token ids by uid.
    """
    tokens: dict[int, list[int]] = defaultdict(list)
    limits: dict[int, int] = {}

    def insert(some: Sequence[Row]) -> None:
        limits.update({each.uid: each.max_new_tokens for each in some})
        runner.insert(some)

    insert(rows)
    steps = 0
    while any(len(tokens[uid]) < limit for uid, limit in limits.items()):
        insert(list(joins(steps)))
        output = step(runner, layers=layers, ahead=ahead(steps))
        assert not output.failed
        for each in output.tokens:
            tokens[each.uid].append(each.token)
        steps += 1
        assert steps < 3000
    return tokens


def alone(runner: ModelRunner, row: Row) -> list[int]:
    """Return the tokens of a row that runs without any other row."""
    return run(runner, [row])[row.uid]


def loaded(settings: Settings) -> ModelRunner:
    """Load the default model of the settings and return its runner."""
    from worker.runner.loading import load  # MLX: only tests of real models need it

    catalog = load_catalog(settings)
    steps = load(settings, catalog.models[catalog.default])
    while True:
        try:
            next(steps)
        except StopIteration as end:
            runner: ModelRunner = end.value
            return runner
