"""Which inputs share a pass, and what the runner of embedding models does with its rows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("mlx_lm")

import mlx.core as mx

from shared.jobs.inputs import Input, numbers, result_lines
from shared.jobs.record import Priority, Status
from shared.jobs.request import EMBED, Request, Sampling
from shared.models.registry import ModelCard
from shared.queue.claims import WriteResult
from tests.plugins.work import claimed
from tests.support.embedding_models import HIDDEN, make_embedding_model
from worker.engine.core import EngineCore
from worker.engine.sequence import Sequence, SequenceOutput
from worker.runner.base import InvalidLogits, PrefillWork, Prompt, Row, RowInputs, StepOutput, StepPlan
from worker.runner.embedding.load import load_embedding_model
from worker.runner.embedding.passes import PendingRow, next_pass
from worker.runner.embedding.runner import EmbeddingRunner

REQUEST = Request("m", 0, Sampling(0.0), kind=EMBED)


def row(uid: int, lengths: list[int], pending: Iterable[int] | None = None) -> Row:
    inputs = tuple(Input((1,) * length) for length in lengths)
    work = RowInputs(inputs, set(range(len(inputs)) if pending is None else pending))
    return Row(uid, REQUEST, (1,) * max(lengths), 0, 0, inputs=work)


def passes(*rows: Row, max_tokens: int) -> list[list[tuple[int, int]]]:
    """Return uid and length of the items of each pass until all inputs are taken."""
    waiting = [PendingRow.of(each) for each in rows]
    taken = []
    while items := next_pass(waiting, max_tokens):
        taken.append([(item.uid, len(item.input.tokens)) for item in items])
    return taken


def test_inputs_of_about_the_same_length_share_a_pass() -> None:
    assert passes(row(1, [10, 100, 60, 12, 40]), max_tokens=400) == [[(1, 60), (1, 100)], [(1, 40)], [(1, 10), (1, 12)]]


def test_padding_counts() -> None:
    assert passes(row(1, [100, 60, 60]), max_tokens=250) == [[(1, 60), (1, 100)], [(1, 60)]]


def test_a_longer_input_has_a_pass_of_its_own() -> None:
    assert passes(row(1, [900, 500]), max_tokens=400) == [[(1, 900)], [(1, 500)]]


def test_other_rows_fill_the_pass_of_the_first() -> None:
    assert passes(row(1, [10]), row(2, [11, 9, 8, 300]), max_tokens=30) == [
        [(1, 10), (2, 8), (2, 9)],
        [(2, 300)],
        [(2, 11)],
    ]


def test_inputs_with_results_are_not_computed_again() -> None:
    assert passes(row(1, [5, 6, 7], pending=[1]), max_tokens=100) == [[(1, 6)]]


@pytest.fixture
def runner(tmp_path: Path) -> EmbeddingRunner:
    model = load_embedding_model(make_embedding_model(tmp_path / "m", "bert", pooling="mean_tokens"), EMBED)
    runner = EmbeddingRunner(model, ModelCard("m", EMBED, 128, dimensions=HIDDEN), 2**30)
    runner.chunk = 32
    return runner


def step(runner: EmbeddingRunner) -> StepOutput:
    waiting = runner.prefillable()
    return runner.execute(StepPlan(PrefillWork(tuple(waiting)) if waiting else None))


def test_rows_take_turns(runner: EmbeddingRunner) -> None:
    runner.insert([row(1, [16] * 20)])
    for _ in range(3):
        step(runner)
    runner.insert([row(2, [5, 5])])
    assert [{result.uid for result in step(runner).results} for _ in range(3)] == [{1}, {2}, {1}]


def test_new_rows_do_not_keep_an_older_one_waiting(runner: EmbeddingRunner) -> None:
    runner.insert([row(1, [16] * 8)])
    for number in range(12):
        if len(runner.prefillable()) < 3:
            runner.insert([row(10 + number, [30])])
        runner.remove(step(runner).prefilled)
    assert 1 not in runner.prefillable(), "every third pass was for the older row"


def test_each_input_has_one_result(runner: EmbeddingRunner) -> None:
    rows = [row(1, [16] * 5), row(2, [7, 20]), row(3, [40])]
    runner.insert(rows)
    outputs = []
    while runner.prefillable():
        outputs.append(step(runner))
    results = sorted((result.uid, result.index) for output in outputs for result in output.results)
    assert results == [(1, 0), (1, 1), (1, 2), (1, 3), (1, 4), (2, 0), (2, 1), (3, 0)]
    assert all(len(numbers(result.encoded)) == HIDDEN for output in outputs for result in output.results)
    assert not any(each.inputs.pending for each in rows if each.inputs), "nothing is left for another attempt"
    assert sorted(uid for output in outputs for uid in output.prefilled) == [1, 2, 3]


def test_a_removed_row_has_no_further_results_and_continues_later(runner: EmbeddingRunner) -> None:
    one, other = row(1, [16] * 6), row(2, [16] * 6)
    runner.insert([one, other])
    first = step(runner)
    runner.remove([1])
    later = [step(runner) for _ in range(4)]
    assert {result.uid for output in later for result in output.results} == {2}
    runner.insert([one])  # as after a preemption
    rest = [result for _ in range(4) for result in step(runner).results]
    done = sorted(result.index for result in (*first.results, *rest) if result.uid == 1)
    assert done == [0, 1, 2, 3, 4, 5]


def test_memory_is_that_of_the_longest_input(runner: EmbeddingRunner) -> None:
    assert runner.batch_bytes([]) == 0
    assert runner.batch_bytes([100]) == runner.batch_bytes([100, 20, 5]) == runner.row_bytes(100)
    assert runner.batch_bytes([8]) > 3 * runner.row_bytes(8), "short inputs share a pass"


def test_passes_are_smaller_if_there_is_little_memory(runner: EmbeddingRunner) -> None:
    model = runner._model
    usual = EmbeddingRunner(model, runner.card, 2**34).chunk
    assert EmbeddingRunner(model, runner.card, 4 * model.pass_bytes(1, usual)).chunk == usual // 2
    assert EmbeddingRunner(model, runner.card, 1).chunk == 128


def test_a_row_with_invalid_numbers_fails_alone(runner: EmbeddingRunner) -> None:
    weight = runner._model.module.embeddings.word_embeddings.weight
    weight[7] = mx.nan
    inputs = (Input((1, 7, 2)), Input((1, 1, 2)))
    bad = Row(2, REQUEST, (1, 7, 2), 0, 0, inputs=RowInputs(inputs, {0, 1}))
    runner.insert([row(1, [3, 3]), bad])
    output = step(runner)
    assert sorted((result.uid, result.index) for result in output.results) == [(1, 0), (1, 1)]
    assert [(uid, type(error)) for uid, error in output.failed] == [(2, InvalidLogits)]
    assert not runner.prefillable(), "the failed row is gone"


class Engine:
    """An engine with the runner."""

    def __init__(self, runner: EmbeddingRunner) -> None:
        self.published: list[SequenceOutput] = []
        self.runner = runner
        self.core = EngineCore(lambda: runner, 4, self.published.extend)
        self.core.load()

    def submit(self, name: str, count: int, priority: Priority = Priority.NORMAL) -> Sequence:
        inputs = tuple(Input((1,) * 16) for _ in range(count))
        job = claimed(name, priority=priority)
        job = replace(job, request=replace(REQUEST, inputs=("x",) * count))
        prompt = Prompt(inputs[0].tokens, inputs=RowInputs(inputs, set(range(count))))
        sequence = Sequence(job, prompt, self.runner)
        self.core.submit(sequence)
        return sequence

    def results(self, sequence: Sequence) -> int:
        return sum(len(result_lines(output.text)) for output in self.published if output.sequence is sequence)


def test_jobs_end_with_their_last_result(runner: EmbeddingRunner) -> None:
    engine = Engine(runner)
    jobs = [engine.submit("a", 5), engine.submit("b", 2)]
    while engine.core.busy or not engine.core.idle:
        engine.core.step()
    assert [engine.results(job) for job in jobs] == [5, 2]
    endings = {output.sequence: output.ending for output in engine.published if output.ending}
    for job, tokens in zip(jobs, (80, 32), strict=True):
        ending = endings[job]
        assert (ending.status, ending.prompt_tokens, ending.completion_tokens) == (Status.SUCCEEDED, tokens, 0)


def test_a_cancelled_job_leaves_at_the_next_step(runner: EmbeddingRunner) -> None:
    engine = Engine(runner)
    job, other = engine.submit("a", 40), engine.submit("b", 6)
    engine.core.step()
    before = engine.results(job)
    engine.core.apply_write_result(job.job.id, job.job.attempt, WriteResult.CANCELLED)
    while engine.core.busy or not engine.core.idle:
        engine.core.step()
    assert engine.results(job) == before, "nothing more is computed"
    assert job.ending is not None
    assert (job.ending.status, engine.results(other)) == (Status.CANCELLED, 6)


def test_jobs_of_a_batch_do_not_delay_others(runner: EmbeddingRunner) -> None:
    engine = Engine(runner)
    engine.submit("batch", 40, Priority.BATCH)
    engine.core.step()
    urgent = engine.submit("urgent", 6)
    for _ in range(3):
        engine.core.step()
    assert (engine.results(urgent), urgent.ending is not None) == (6, True)
