"""Drives a model runner without the engine: prefills whatever can be prefilled, and decodes."""

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
    most: int = 12,
    sampling: Sampling = GREEDY,
    owner: str | None = None,
    logprobs: int | None = None,
) -> Row:
    """A row that begins with a prompt."""
    return Row(uid, Request("m", most, sampling, logprobs=logprobs), tuple(prompt), 0, most, owner)


def numbered(uid: int, length: int, most: int = 12, sampling: Sampling = GREEDY) -> Row:
    """A row with a prompt of `length` tokens, different for each uid."""
    return row(uid, [(uid * 977 + i * 131) % 40_000 + 100 for i in range(length)], most, sampling)


def resumed(whole: Row, uid: int, said: Sequence[int]) -> Row:
    """A row that goes on behind what it has said."""
    left = whole.max_new_tokens - len(said)
    return replace(whole, uid=uid, prompt=(*whole.prompt, *said), generated=len(said), max_new_tokens=left)


def plan(runner: ModelRunner, *, layers: int | None = None) -> StepPlan:
    """In the order of insertion: short prompts together, a long one in chunks (some layers of one at a time)."""
    unread = runner.prefillable()
    encode = EncodeWork() if runner.images_waiting() is not None else None
    short = [uid for uid, each in unread.items() if each.tokens <= 2 * runner.chunk and not each.under_way]
    first = next(iter(unread), None)
    work = None
    if first is not None:
        work = PrefillWork(tuple(short[:8])) if first in short else PrefillWork((first,), runner.chunk, layers)
    return StepPlan(work, encode, speculate=not unread and encode is None)


def step(runner: ModelRunner, *, layers: int | None = None) -> StepOutput:
    """The next one."""
    return runner.execute(plan(runner, layers=layers))


def run(
    runner: ModelRunner,
    rows: Sequence[Row],
    joins: Callable[[int], Iterable[Row]] = lambda _: (),
    *,
    layers: int | None = None,
) -> dict[int, list[int]]:
    """Step until every row has had all its tokens; `joins` gives rows to insert before a step. Tokens by uid."""
    said: dict[int, list[int]] = defaultdict(list)
    due: dict[int, int] = {}

    def insert(some: Sequence[Row]) -> None:
        due.update({each.uid: each.max_new_tokens for each in some})
        runner.insert(some)

    insert(rows)
    steps = 0
    while any(len(said[uid]) < most for uid, most in due.items()):
        insert(list(joins(steps)))
        output = step(runner, layers=layers)
        assert not output.failed
        for each in output.tokens:
            said[each.uid].append(each.token)
        steps += 1
        assert steps < 3000
    return said


def alone(runner: ModelRunner, one: Row) -> list[int]:
    """What a row says when it runs alone."""
    return run(runner, [one])[one.uid]


def loaded(settings: Settings) -> ModelRunner:
    """The runner of the settings' model, loaded in all its steps."""
    from worker.runner.loading import load  # MLX: only tests of real models need it

    catalog = load_catalog(settings)
    steps = load(settings, catalog.models[catalog.default])
    while True:
        try:
            next(steps)
        except StopIteration as end:
            runner: ModelRunner = end.value
            return runner
