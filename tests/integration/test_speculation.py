"""Several tokens in a step: the text is what it would have been, whatever is guessed, and dear guesses end."""

from __future__ import annotations

import signal
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any, cast

import pytest

pytest.importorskip("mlx_lm")

import mlx.core as mx

from shared.jobs.log import EventKind
from shared.jobs.request import Sampling
from tests.plugins.stack import Stack
from tests.support.waiting import eventually
from worker.models.load import LoadedModel, load_model
from worker.runner import kv_cache as kv
from worker.runner.base import Row
from worker.runner.decode_row import Slot
from worker.runner.memory import Memory
from worker.runner.model_runner import TextBackend
from worker.runner.speculation.ngram import Lookup
from worker.runner.speculation.pass_cost import LENGTHS
from worker.runner.speculation.verification import MOST_ROWS, Speculation

CHUNK = 16
GREEDY = Sampling(temperature=0.0)
SAMPLINGS = (GREEDY, Sampling(1.0, seed=11), Sampling(0.8, top_p=0.9, seed=2**63), Sampling(1.2, top_k=40, seed=-5))
PENALISED = Sampling(0.0, repetition_penalty=1.3)


@pytest.fixture(scope="module")
def tiny(tiny_model_path: Path) -> LoadedModel:
    return load_model(tiny_model_path)


@pytest.fixture
def plain(tiny: LoadedModel) -> TextBackend:
    return TextBackend(tiny, CHUNK)


@pytest.fixture
def backend(tiny: LoadedModel) -> TextBackend:
    return TextBackend(tiny, CHUNK, Memory(2**30, 2**28), speculation_tokens=16)


def row(uid: int, length: int, room: int, sampling: Sampling = GREEDY, owner: str | None = None) -> Row:
    prompt = tuple((uid * 977 + i * 131) % 40_000 + 100 for i in range(length))
    return Row(uid, prompt, 0, room, sampling, owner)


Said = dict[int, list[int]]


def run(backend: TextBackend, rows: Sequence[Row], late: dict[int, list[Row]] | None = None) -> Said:
    """Step until all rows have had their room; `late` are those to insert before a step."""
    said: Said = defaultdict(list)
    waiting = dict(late or {})
    due = sum(each.room for each in [*rows, *(one for some in waiting.values() for one in some)])
    backend.insert(rows)
    for step in range(2000):
        backend.insert(waiting.pop(step, []))
        for uid, token in backend.step().tokens:
            said[uid].append(token)
        if sum(map(len, said.values())) >= due and not waiting:
            break
    assert not backend.step().tokens
    return said


def answers(plain: TextBackend, rows: Sequence[Row]) -> Said:
    """What they say alone, without guesses."""
    return {each.uid: run(plain, [each])[each.uid] for each in rows}


@contextmanager
def guessing(rows: Sequence[Row], expected: Said, wrong: Callable[[int], bool]) -> Iterator[None]:
    """Guess in every step, by any length, what the rows are going to say, but for the tokens at wrong places."""
    whole = [[*each.prompt, *expected[each.uid]] for each in rows]
    lengths = cycle(LENGTHS)

    def guess(lookup: Lookup, most: int) -> list[int]:
        known = lookup._tokens
        text = next(each for each in whole if each[: len(known)] == known)
        return [token + wrong(len(known) + i) for i, token in enumerate(text[len(known) :][:most])]

    def length(_: Speculation, slots: Sequence[Slot]) -> int:
        room = min(slot.room if slot.chosen else 0 for slot in slots)
        return next((each for each in [next(lengths), *LENGTHS[::-1]] if each < room), 0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Lookup, "guess", guess)
        patch.setattr(Speculation, "length", length)
        yield


def fifth(place: int) -> bool:
    return place % 5 == 3


def drafted(backend: TextBackend) -> tuple[float, float]:
    stats = backend.stats()
    return stats["speculation_drafted_tokens_total"], stats["speculation_accepted_tokens_total"]


@pytest.mark.parametrize("wrong", [lambda _: False, fifth, lambda _: True], ids=["right", "mixed", "wrong"])
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_guesses_change_no_token(
    plain: TextBackend, backend: TextBackend, sampling: Sampling, wrong: Callable[[int], bool]
) -> None:
    one = row(1, 21, 60, sampling)
    expected = answers(plain, [one])
    with guessing([one], expected, wrong):
        assert run(backend, [one]) == expected
    tried, right = drafted(backend)
    assert tried > 50
    places = {wrong(place) for place in range(9)}
    assert (right == tried, right == 0) == (places == {False}, places == {True})


def test_right_guesses_spare_steps(plain: TextBackend, backend: TextBackend) -> None:
    one = row(1, 21, 120)
    expected = answers(plain, [one])
    with guessing([one], expected, lambda _: False):
        backend.insert([one])
        most = max(len(backend.step().tokens) for _ in range(40))
    assert most == 17
    assert not backend.step().tokens


@pytest.mark.parametrize("room", [1, 2, 3, 4, 5, 17, 18, 19, 20])
def test_a_row_never_gets_more_than_its_room(plain: TextBackend, backend: TextBackend, room: int) -> None:
    one = row(1, 9, room)
    expected = answers(plain, [one])
    longer = answers(plain, [replace(one, room=60)])
    with guessing([one], longer, fifth):
        assert run(backend, [one]) == expected
    assert backend.stats()["kv_bytes"] == 0


def test_a_few_rows_are_guessed_together_as_they_come_and_go(plain: TextBackend, backend: TextBackend) -> None:
    """Of different lengths and samplings; each keeps as many of its tokens as are right for it."""
    rows = [row(uid, 5 + 9 * uid, 20 + 7 * uid, SAMPLINGS[uid % 4]) for uid in range(8)]
    expected = answers(plain, rows)
    late = {3: rows[2:3], 5: rows[3:4], 9: rows[4:5], 12: rows[5:7], 14: rows[7:]}
    with guessing(rows, expected, lambda place: place % 7 in (2, 3)):
        assert run(backend, rows[:2], late) == expected
    tried, right = drafted(backend)
    assert 0 < right < tried


def test_more_rows_than_a_few_are_not_guessed(plain: TextBackend, backend: TextBackend) -> None:
    rows = [row(uid, 9, 12) for uid in range(MOST_ROWS + 1)]
    expected = answers(plain, rows)
    with guessing(rows, expected, fifth):
        assert run(backend, rows) == expected
    assert drafted(backend) == (0, 0)


def test_rows_with_penalties_are_not_guessed_nor_what_is_beside_them(plain: TextBackend, backend: TextBackend) -> None:
    rows = [row(1, 9, 30, PENALISED), row(2, 9, 20)]
    expected = answers(plain, rows)
    with guessing(rows, expected, fifth):
        assert run(backend, rows) == expected
    assert drafted(backend) == (0, 0)


def test_nothing_is_guessed_while_a_prompt_is_read(plain: TextBackend, backend: TextBackend) -> None:
    rows = [row(1, 9, 200), row(2, 40 * CHUNK, 5)]
    expected = answers(plain, rows)
    with guessing(rows, expected, fifth):
        backend.insert(rows[:1])
        said = [token for _ in range(5) for _, token in backend.step().tokens]
        backend.insert(rows[1:])
        while not (result := backend.step()).prefilled:
            said += [token for _, token in result.tokens]
            assert len(result.tokens) <= 1
        said += [token for uid, token in result.tokens if uid == 1]
        while len(said) < 200:
            said += [token for uid, token in backend.step().tokens if uid == 1]
    assert said == expected[1]


@pytest.mark.parametrize("sampling", SAMPLINGS[:2], ids=str)
def test_a_row_goes_on_where_it_was_cut(plain: TextBackend, backend: TextBackend, sampling: Sampling) -> None:
    one = row(0, 9, 40, sampling)
    said = answers(plain, [one])[0]
    rows = [
        replace(one, uid=cut, prompt=(*one.prompt, *said[:cut]), generated=cut, room=40 - cut) for cut in range(1, 30)
    ]
    for each in rows:
        rest = {each.uid: said[each.uid :]}
        with guessing([each], rest, fifth):
            assert run(backend, [each]) == rest


@pytest.mark.parametrize("steps", range(1, 9))
def test_what_is_left_when_a_row_is_removed_is_what_it_had(
    plain: TextBackend, backend: TextBackend, tiny: LoadedModel, steps: int
) -> None:
    """The prefix that the next row takes over has the keys and values of exactly its tokens."""
    one = row(1, 30, 150, owner="me")
    expected = answers(plain, [one])
    with guessing([one], expected, fifth):
        backend.insert([one])
        said = [token for _ in range(steps) for _, token in backend.step().tokens]
        backend.remove([1])
    assert said == expected[1][: len(said)]
    assert backend.stats()["kv_bytes"] == 0
    text = (*one.prompt, *expected[1])
    length, layers = backend._prefixes.load("me", text)
    assert length in {len(one.prompt) - 1, len(one.prompt) + len(said) - 1, len(one.prompt) + len(said)}
    fresh = kv.single(tiny.model)
    tiny.model(mx.array([text[:length]]), cache=fresh)
    for found, made in zip(layers, fresh, strict=True):
        for part, other in zip(found.state[:2], made.state[:2], strict=True):
            assert mx.allclose(part[:, :, :length], other[:, :, :length], rtol=1e-3, atol=1e-5)
    again = replace(one, uid=2, prompt=(*text[:length], 7, 8), room=9)
    assert run(backend, [again])[2] == run(plain, [replace(again, owner=None)])[2]


def test_a_prompt_that_repeats_is_looked_up_without_being_told(tiny: LoadedModel, plain: TextBackend) -> None:
    """The model of this test says what follows its last token in the prompt: it repeats it for ever."""
    repeating = Repeating(tiny, wide=0.1)
    backend = repeating.backend()
    one = Row(1, (*range(100, 160), 100), 0, 300, GREEDY)
    assert run(backend, [one])[1] == [101 + (i % 60) for i in range(59)] + [100 + (i % 60) for i in range(241)]
    tried, right = drafted(backend)
    assert right > 200
    assert repeating.passes < 80
    assert tried - right < 30


class Repeating:
    """The tiny model, made to repeat; a pass takes a second by its clock, and so much more for each further token."""

    def __init__(self, tiny: LoadedModel, wide: float, says: Callable[[int], int] | None = None) -> None:
        self.now = 0.0
        self.passes = 0
        self._tiny = tiny
        self._wide = wide
        self._says = says or (lambda token: 100 + (token - 99) % 60)

    def backend(self) -> TextBackend:
        loaded = replace(self._tiny, model=self)
        return TextBackend(loaded, CHUNK, clock=lambda: self.now, speculation_tokens=16)

    def __call__(self, tokens: mx.array, cache: kv.Layers) -> mx.array:
        logits = self._tiny.model(tokens, cache=cache)
        self.passes += 1
        self.now += 1 + self._wide * (tokens.shape[1] - 1)
        said = [[self._says(token) for token in each] for each in cast("list[list[int]]", tokens.tolist())]
        return mx.put_along_axis(mx.zeros_like(logits), mx.array(said)[:, :, None], mx.array(1.0), axis=-1)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tiny.model, name)


def test_guesses_that_cost_what_they_spare_end(tiny: LoadedModel) -> None:
    """Each token more costs as much as a pass: it is tried a few times, and now and then again."""
    repeating = Repeating(tiny, wide=1.0)
    backend = repeating.backend()
    run(backend, [Row(1, (*range(100, 160), 100), 0, 1200, GREEDY)])
    assert 0 < drafted(backend)[0] < 150
    assert repeating.now < 60 + 1200 * 1.02


def test_guesses_that_are_wrong_end(tiny: LoadedModel) -> None:
    """Pairs of tokens come again and again, and what follows them is never the same."""
    said = iter(token for i in range(5000) for token in (50, 51, 1000 + i))
    following: dict[int, int] = {}

    def says(token: int) -> int:
        return following.setdefault(token, next(said)) if token >= 1000 else {50: 51}.get(token, 1000 + len(following))

    repeating = Repeating(tiny, wide=0.2, says=says)
    backend = repeating.backend()
    run(backend, [Row(1, tuple(range(100, 160)), 0, 1200, GREEDY)])
    assert repeating.now < 12 + 1200 * 1.02


def test_what_did_not_pay_pays_when_passes_have_become_cheap(tiny: LoadedModel) -> None:
    repeating = Repeating(tiny, wide=1.0)
    backend = repeating.backend()
    run(backend, [Row(1, (*range(100, 160), 100), 0, 300, GREEDY)])
    before = drafted(backend)[1]
    repeating._wide = 0.05
    run(backend, [Row(2, (*range(100, 160), 100), 0, 1500, GREEDY)])
    assert drafted(backend)[1] - before > 500


def test_zero_tokens_mean_none(tiny: LoadedModel) -> None:
    backend = TextBackend(tiny, CHUNK)
    backend.warm()
    run(backend, [Row(1, (*range(100, 160), 100), 0, 50, GREEDY)])
    assert drafted(backend) == (0, 0)


TEXT = (
    "On Monday morning Anna walked down to the harbour, bought two loaves of bread, a jar of honey and a newspaper, "
    "and sat on the old stone wall to wait for the ferry. The sea was quiet, the gulls were loud, and the ferry was "
    "late, as it had been every Monday since the spring."
)


def stat(stack: Stack, name: str) -> float:
    return sum(worker.stats.get(name, 0) for worker in stack.ready_workers())


@pytest.mark.long
def test_killed_workers_texts_go_on_as_if_nothing_had_been_guessed(smollm2_api: Stack) -> None:
    stack = smollm2_api
    question = {"role": "user", "content": f"Repeat this text word for word: {TEXT}"}
    bodies = [{"messages": [question], "temperature": drawn, "seed": 3, "max_tokens": 70} for drawn in (0, 0.3)]
    with stack.client() as client:
        first = stack.start_worker(SPECULATION_TOKENS="0")
        undisturbed = [client.submit(body).id for body in bodies]
        eventually(lambda: all(client.job(job).status.terminal for job in undisturbed), "they end", 60)
        expected = [client.job(job) for job in undisturbed]
        assert stat(stack, "speculation_drafted_tokens_total") == 0
        stack.stop(first)
        second = stack.start_worker()
        jobs = [client.submit(body).id for body in bodies]
        for event in client.events(jobs[1]):
            if event.n > 4 and event.text and second.poll() is None:
                assert stack.stop(second, signal.SIGKILL) == -signal.SIGKILL
                stack.start_worker()
        eventually(lambda: all(client.job(job).status.terminal for job in jobs), "they end", 60)
        eventually(lambda: stat(stack, "speculation_accepted_tokens_total") > 10, "tokens were guessed", 10)
        for job, said in zip(map(client.job, jobs), expected, strict=True):
            events = list(client.events(job.id))
            assert EventKind.RESUMED in {event.kind for event in events}
            assert job.text == "".join(event.text for event in events) == said.text
            assert job.usage["completion_tokens"] == said.usage["completion_tokens"]
