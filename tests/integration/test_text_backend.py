"""The text backend on real models, beside mlx-lm's own `generate`."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("mlx_lm")

from mlx_lm import generate, stream_generate
from mlx_lm.sample_utils import make_logits_processors

from shared.errors import JobFailure
from shared.jobs.request import Request, Sampling
from shared.models.catalog import load_catalog
from shared.models.folder import ModelError
from shared.models.registry import ModelCard
from shared.settings import Settings
from worker.engine.prefill_budget import AIM, PAUSE, PAUSE_AFTER
from worker.models.load import LoadedModel, load_model
from worker.runner import kv_cache as kv
from worker.runner.base import Fit, OutOfMemory, Prompt, PromptError, Row
from worker.runner.memory import Memory
from worker.runner.model_runner import TextBackend, load

GREEDY = Sampling(temperature=0.0)
CHUNK = 16
QUESTIONS = (
    "What is the capital of France?",
    "Name three colours.",
    "How many legs has a spider?",
    "Write one sentence about the sea.",
    "What is 12 times 3?",
    "Who wrote Hamlet?",
    "Translate 'good morning' into French, then into German, and say which of the two is longer and by how much.",
    "Hi",
)
SAMPLINGS = (
    GREEDY,
    Sampling(1.0, seed=11),
    Sampling(0.8, top_p=0.9, seed=2**63),
    Sampling(1.2, top_k=40, min_p=0.02, seed=13, repetition_penalty=1.1),
    Sampling(0.0, presence_penalty=0.7, frequency_penalty=0.3),
    Sampling(0.7, top_p=0.95, top_k=20, seed=-5),
)


@pytest.fixture(scope="module")
def tiny(tiny_model_path: Path) -> LoadedModel:
    return load_model(tiny_model_path)


@pytest.fixture(scope="module")
def smollm2(smollm2_path: Path) -> LoadedModel:
    return load_model(smollm2_path)


@pytest.fixture
def backend(tiny: LoadedModel) -> TextBackend:
    return TextBackend(tiny, CHUNK)


def row(backend: TextBackend, uid: int, length: int, room: int = 12, sampling: Sampling = GREEDY) -> Row:
    """A row of the tiny model with a prompt of so many tokens, different for each uid."""
    return Row(uid, tuple((uid * 977 + i * 131) % 40_000 + 100 for i in range(length)), 0, room, sampling)


def run(
    backend: TextBackend, rows: Sequence[Row], joins: Callable[[int], Iterable[Row]] = lambda _: ()
) -> dict[int, list[int]]:
    """Step until nothing is left; `joins` gives the rows to insert before a step. The tokens of each uid."""
    said: dict[int, list[int]] = defaultdict(list)
    rooms: dict[int, int] = {}

    def insert(some: Sequence[Row]) -> None:
        rooms.update({each.uid: each.room for each in some})
        backend.insert(some)

    insert(rows)
    steps = 0
    while len(rooms) > sum(len(said[uid]) == room for uid, room in rooms.items()):
        insert(list(joins(steps)))
        for uid, token in backend.step().tokens:
            said[uid].append(token)
        steps += 1
        assert steps < 2000
    return said


def loaded(settings: Settings) -> TextBackend:
    """The model of the settings, in all its pieces."""
    catalog = load_catalog(settings)
    pieces = load(settings, catalog.models[catalog.default])
    while True:
        try:
            next(pieces)
        except StopIteration as end:
            backend: TextBackend = end.value
            return backend


def alone(backend: TextBackend, one: Row) -> list[int]:
    return run(backend, [one])[one.uid]


@pytest.mark.long
def test_greedy_rows_say_what_mlx_lm_says(smollm2: LoadedModel) -> None:
    backend = TextBackend(smollm2, 64)
    prompts = [backend.encode(chat(question), {}).tokens for question in QUESTIONS]
    expected = [generate(smollm2.model, smollm2.tokenizer, list(prompt), max_tokens=14) for prompt in prompts]
    assert "Paris" in expected[0]
    rows = [Row(uid, prompt, 0, 14, GREEDY) for uid, prompt in enumerate(prompts)]
    late = {3: rows[3:5], 4: rows[5:6], 9: rows[6:]}
    for said in (run(backend, rows), run(backend, rows[:3], lambda step: late.get(step, ()))):
        assert [text(backend, said[uid]) for uid in range(len(rows))] == expected


def chat(question: str) -> Request:
    return Request("m", 24, GREEDY, messages=({"role": "user", "content": question},))


def text(backend: TextBackend, tokens: Iterable[int]) -> str:
    """The text of an answer, up to its end token."""
    detokenizer = backend.detokenizer()
    parts = []
    for token in tokens:
        if token in backend.eos:
            break
        parts.append(detokenizer.add(token))
    return "".join(parts) + detokenizer.finish()


def test_penalised_rows_say_what_mlx_lm_says(tiny: LoadedModel, backend: TextBackend) -> None:
    sampling = Sampling(0.0, repetition_penalty=1.4, presence_penalty=0.3, frequency_penalty=0.2)
    one = row(backend, 1, 30, room=40, sampling=sampling)
    processors = make_logits_processors(repetition_penalty=1.4, presence_penalty=0.3, frequency_penalty=0.2)
    answer = stream_generate(tiny.model, tiny.tokenizer, list(one.prompt), 40, logits_processors=processors)
    expected = [response.token for response in answer]
    assert alone(backend, one)[: len(expected)] == expected


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_a_row_is_the_same_alone_and_in_company(backend: TextBackend, sampling: Sampling) -> None:
    one = row(backend, 1, 21, room=16, sampling=sampling)
    expected = alone(backend, one)
    others = [row(backend, 10 + i, 1 + 7 * i, 3 + i, each) for i, each in enumerate(SAMPLINGS)]
    late = {2: [one], 3: others[3:5], 9: others[5:]}
    assert run(backend, others[:3], lambda step: late.get(step, ()))[1] == expected
    assert run(backend, [*others[:4], one, *others[4:]])[1] == expected


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_a_row_goes_on_where_it_was_cut(backend: TextBackend, sampling: Sampling) -> None:
    whole = row(backend, 0, 9, room=12, sampling=sampling)
    expected = alone(backend, whole)
    rows = [
        replace(whole, uid=cut, prompt=(*whole.prompt, *expected[:cut]), generated=cut, room=12 - cut)
        for cut in range(12)
    ]
    said = run(backend, rows)
    assert [said[cut] for cut in range(12)] == [expected[cut:] for cut in range(12)]


def test_a_long_prompt_stops_neither_decoding_nor_short_prompts(tiny: LoadedModel) -> None:
    backend = TextBackend(tiny, CHUNK, clock=lambda: 0.0)
    decoding, long, short = row(backend, 1, 5, 400), row(backend, 2, 50 * CHUNK), row(backend, 3, CHUNK // 2)
    backend.insert([decoding])
    backend.step()
    backend.insert([long, short])
    seen: dict[int, int] = {}
    for step in range(200):
        result = backend.step()
        assert result.prompt_tokens <= CHUNK
        assert 1 in dict(result.tokens)
        for uid, _ in result.tokens:
            seen.setdefault(uid, step)
        if 2 in seen:
            break
    assert seen[3] <= 3
    assert 50 <= seen[2] <= 53 + PAUSE * (50 // PAUSE_AFTER + 1)


def test_chunks_are_as_small_as_the_time_of_a_step_demands(tiny: LoadedModel) -> None:
    """A step takes 10 s and each token of a prompt 1 s more: 10 of them take as long as a step."""
    now = 0.0
    backend = TextBackend(tiny, CHUNK, clock=lambda: now)
    backend.insert([row(backend, 1, 5, 400)])
    backend.insert([row(backend, 2, 20 * CHUNK)])
    chunks: list[int] = []
    while sum(chunks) < 20 * CHUNK:
        read = backend.step().prompt_tokens
        now += 10 + read
        chunks.append(read)
        assert len(chunks) < 100
    demanded = round(10 * (AIM - 1))
    assert chunks.count(demanded) > 20
    assert set(chunks[20:-1]) <= {0, demanded}
    assert backend.stats()["prefill_chunk_tokens"] == demanded


def test_a_long_prompt_has_place_for_all_of_it_from_its_second_chunk(backend: TextBackend) -> None:
    backend.insert([row(backend, 1, 50 * CHUNK)])
    seen = []
    while not backend.step().prefilled:
        seen.append(backend.stats()["kv_bytes"])
    assert len(set(seen[1:])) == 1
    assert len(seen) >= 50


def test_short_prompts_are_read_together(backend: TextBackend) -> None:
    backend.insert([row(backend, uid, 1 + uid) for uid in range(8)])
    assert backend.step().prompt_tokens == sum(range(8))
    result = backend.step()
    assert sorted(result.prefilled) == sorted(uid for uid, _ in result.tokens) == list(range(8))


def test_rows_leave_in_every_stage(backend: TextBackend) -> None:
    """Removed before, between and after its chunks and tokens, a row is gone at once and changes nothing for others."""
    stays = row(backend, 1, 20, room=12, sampling=SAMPLINGS[3])
    expected = alone(backend, stays)
    for steps in range(8):
        leaves = [row(backend, 2, 3 * CHUNK), row(backend, 3, 4), row(backend, 4, 1)]
        backend.insert([leaves[0], stays, *leaves[1:]])
        said = [token for _ in range(steps) for uid, token in backend.step().tokens if uid == 1]
        backend.remove([2, 3, 4, 99])
        while len(said) < 12:
            result = backend.step()
            assert {uid for uid, _ in result.tokens} | set(result.prefilled) <= {1}
            said += [token for _, token in result.tokens]
        assert said == expected
        assert backend.stats()["kv_bytes"] == 0


def test_places_are_taken_over_again_and_again(backend: TextBackend) -> None:
    """Rows that come and go for long leave the cache as narrow as the rows that are in it."""
    rows = [row(backend, uid, 1 + uid * 7 % 40, 5 + uid % 9, SAMPLINGS[uid % len(SAMPLINGS)]) for uid in range(60)]
    expected = {each.uid: alone(backend, each) for each in rows[::6]}
    for each in rows[:8]:
        backend.insert([each])
    waiting = rows[8:]
    said: dict[int, list[int]] = defaultdict(list)
    most = 0.0
    while waiting or sum(map(len, said.values())) < sum(each.room for each in rows):
        for uid, token in backend.step().tokens:
            said[uid].append(token)
            if len(said[uid]) == rows[uid].room and waiting:
                backend.insert([waiting.pop(0)])
        most = max(most, backend.stats()["kv_bytes"])
    assert {uid: said[uid] for uid in expected} == expected
    per_column = 2 * 2 * 2 * 16 * 4  # keys and values, layers, heads, width, bytes
    assert most <= 12 * per_column * 768


def test_a_row_that_cannot_be_decoded_fails_alone(backend: TextBackend) -> None:
    good = row(backend, 1, 5)
    expected = alone(backend, good)
    bad = [
        replace(good, uid=2, prompt=()),
        replace(good, uid=3, prompt=(1, 10**6)),
        replace(good, uid=4, prompt=(-1,)),
        replace(good, uid=5, room=0),
        replace(good, uid=6, sampling=Sampling(float("nan"))),
    ]
    backend.insert([*bad[:2], good, *bad[2:]])
    backend.remove([6])
    result = backend.step()
    assert [uid for uid, _ in result.failed] == [2, 3, 4, 5]
    said = [token for _ in range(13) for _, token in backend.step().tokens]
    assert said == expected


def test_reset_drops_everything(backend: TextBackend) -> None:
    one = row(backend, 1, 5)
    expected = alone(backend, one)
    backend.insert([row(backend, 2, 3 * CHUNK), row(backend, 3, 4), replace(one, uid=4, room=0)])
    backend.step()
    backend.reset()
    assert backend.step() == backend.step()
    assert alone(backend, one) == expected


def test_it_works_on_a_thread_that_did_not_import_it(tiny_model_path: Path, backend: TextBackend) -> None:
    one = row(backend, 1, 40)
    expected = alone(backend, one)
    found: list[list[int]] = []
    settings = Settings(model_path=tiny_model_path, prefill_step_tokens=CHUNK)
    thread = threading.Thread(target=lambda: found.append(alone(loaded(settings), one)))
    thread.start()
    thread.join(60)
    assert found == [expected]


def test_encode(tiny: LoadedModel, backend: TextBackend) -> None:
    question = "naïve 東京 🙂 \u200d and\r\n\ttabs"
    tokens = backend.encode(chat(question), {}).tokens
    assert question in tiny.tokenizer.decode(list(tokens))
    assert tokens == tuple(
        tiny.tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)
    )
    plain = backend.encode(Request("m", 1, GREEDY, prompt=question), {}).tokens
    assert tiny.tokenizer.decode(list(plain)) == question


def test_encode_from_many_threads_in_turn(backend: TextBackend) -> None:
    prompts = [f"{'word ' * (i % 50)} {i}" for i in range(200)]
    generations = [Request("m", 1, GREEDY, prompt=prompt) for prompt in prompts]
    turn = threading.Lock()

    def encode(generation: Request) -> Prompt:
        with turn:
            return backend.encode(generation, {})

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(encode, generations))
    assert found == [backend.encode(generation, {}) for generation in generations]


def test_prompts_that_do_not_fit(backend: TextBackend) -> None:
    backend.card = replace(backend.card, context=10)
    with pytest.raises(PromptError) as caught:
        backend.encode(Request("m", 1, GREEDY, prompt="a b c d e f g h i j"), {})
    assert caught.value.code == JobFailure.CONTEXT_LENGTH
    assert len(backend.encode(Request("m", 1, GREEDY, prompt="a b c d e f g h i"), {}).tokens) == 9


def test_templates_that_refuse(tiny: LoadedModel) -> None:
    backend = TextBackend(tiny, CHUNK)
    for template, said in (
        ("{{ raise_exception('roles alternate') }}", "roles alternate"),
        ("{{ 1 + 'a' }}", "s.$"),
    ):
        backend._encoder._tokenizer.chat_template = template
        with pytest.raises(PromptError, match=said) as caught:
            backend.encode(chat("Hi"), {})
        assert caught.value.code == JobFailure.TEMPLATE


def test_the_detokenizer_streams_whole_characters(tiny: LoadedModel, backend: TextBackend) -> None:
    for said in ("naïve 東京 🙂 family: 👨‍👩‍👧", "  two  spaces ", "one\n\ntwo\n"):
        detokenizer = backend.detokenizer()
        parts = [detokenizer.add(token) for token in tiny.tokenizer.encode(said, add_special_tokens=False)]
        parts.append(detokenizer.finish())
        assert "\ufffd" not in "".join(parts)
        # mlx-lm drops a space that begins the whole text.
        assert "".join(parts) == (said[1:] if said[0] == " " else said)


def test_the_card(tiny: LoadedModel) -> None:
    assert isinstance(tiny.card, ModelCard)
    assert (tiny.card.id, tiny.card.kind, tiny.card.context) == ("tiny-random-llama", "text", 8192)
    assert tiny.card.eos_token == "<|im_end|>"
    assert tiny.card.chat_template
    assert len(tiny.card.tokenizer or "") == 16
    assert tiny.tokenizer.eos_token_id in tiny.eos


def test_about(backend: TextBackend) -> None:
    assert {"device", "dtype", "parameters", "mlx", "mlx_lm"} <= backend.about.keys()
    assert backend.about["dtype"] == "float32"


MARK = 99
"""A token that the rows of these tests have in their prompts when the device has no memory for them."""


@pytest.fixture
def scarce(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Reading the mark fails for want of memory, as often as the list says (its only number)."""
    times, put = [10**9], kv.put

    def failing(model: object, layers: kv.Layers, tokens: Sequence[Sequence[int]], *more: object) -> None:
        if any(MARK in row for row in tokens) and times[0]:
            times[0] -= 1
            raise RuntimeError("[malloc] Unable to allocate 4294967296 bytes.")
        put(model, layers, tokens, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(kv, "put", failing)
    return times


def marked(one: Row, place: int) -> Row:
    return replace(one, prompt=(*one.prompt[:place], MARK, *one.prompt[place + 1 :]))


@pytest.mark.parametrize("length", [8, 5 * CHUNK], ids=["short", "long"])
def test_a_prompt_that_memory_does_not_suffice_for_fails_alone(
    tiny: LoadedModel, scarce: list[int], length: int
) -> None:
    backend = TextBackend(tiny, CHUNK, Memory(2**30, 2**28))
    running, bad = row(backend, 1, 40, room=30), marked(row(backend, 2, length), length - 3)
    others = [row(backend, uid, 8, room=6) for uid in (3, 4, 5)] + [row(backend, 6, 6 * CHUNK, room=6)]
    expected = {each.uid: alone(backend, each) for each in (running, *others)}
    backend.insert([replace(running, owner="me")])
    said: dict[int, list[int]] = defaultdict(list)
    failed: dict[int, Exception] = {}
    for step in range(60):
        if step == 4:
            assert backend.stats()["prefix_cache_bytes"]
            backend.insert([others[0], bad, *others[1:]])
        result = backend.step()
        failed |= dict(result.failed)
        if failed and 2 in dict(result.failed):
            assert not backend.stats()["prefix_cache_bytes"]
        for uid, token in result.tokens:
            said[uid].append(token)
    assert {uid: type(error) for uid, error in failed.items()} == {2: OutOfMemory}
    assert said == expected
    assert scarce[0] == 10**9 - 2
    assert backend.fits(10) is Fit.NOW


@pytest.mark.parametrize("length", [8, 5 * CHUNK], ids=["short", "long"])
def test_a_prompt_is_read_again_once_memory_was_given_back(
    backend: TextBackend, scarce: list[int], length: int
) -> None:
    one = marked(row(backend, 1, length), 4)
    scarce[0] = 0
    expected = alone(backend, one)
    scarce[0] = 1
    assert run(backend, [one, row(backend, 2, 5)])[1] == expected


def test_other_errors_are_not_taken_for_want_of_memory(backend: TextBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv, "put", lambda *_: 1 / 0)
    backend.insert([row(backend, 1, 5)])
    with pytest.raises(ZeroDivisionError):
        backend.step()


def test_want_of_memory_while_decoding_loses_the_batch(backend: TextBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    backend.insert([row(backend, 1, 5)])
    backend.step()

    def full(_: object) -> None:
        raise RuntimeError("[metal::malloc] Resource limit (499000) exceeded.")

    monkeypatch.setattr("mlx.core.async_eval", full)
    with pytest.raises(OutOfMemory):
        backend.step()


def test_no_row_fails_for_want_of_memory_that_another_model_may_not_take_after_all(tiny: LoadedModel) -> None:
    limit = 12 * 768 * 2 * 2 * 2 * 16 * 4
    backend = TextBackend(tiny, CHUNK, Memory(limit, limit))
    backend.grant(limit // 12, limit)
    assert [backend.fits(each) for each in (768, 12 * 768, 12 * 768 + 1)] == [Fit.NOW, Fit.LATER, Fit.NEVER]
    backend.grant(limit // 12)
    assert backend.fits(12 * 768) is Fit.NEVER


def test_rows_stay_within_the_memory_they_are_given(tiny: LoadedModel) -> None:
    """Rows of all lengths, admitted when they fit: the caches of rows and prefixes never take more."""
    limit = 12 * 768 * 2 * 2 * 2 * 16 * 4  # rows, columns, keys and values, layers, heads, width, bytes
    backend = TextBackend(tiny, CHUNK, Memory(limit, limit))
    assert backend.fits(12 * 768 + 1) is Fit.NEVER
    waiting = [replace(row(backend, uid, 1 + uid * 37 % 300, 50 + uid * 13 % 60), owner="me") for uid in range(60)]
    ends = {each.uid: each.room for each in waiting}
    rows = most = 0
    while ends:
        while waiting and backend.fits(len(waiting[0].prompt) + waiting[0].room) is Fit.NOW:
            backend.insert([waiting.pop(0)])
        result = backend.step()
        rows = max(rows, len(result.tokens))
        for uid, _ in result.tokens:
            ends[uid] -= 1
        backend.remove([uid for uid, left in ends.items() if not left])
        ends = {uid: left for uid, left in ends.items() if left}
        stats = backend.stats()
        most = max(most, stats["kv_bytes"] + stats["prefix_cache_bytes"])
    assert rows > 6
    assert limit / 4 < most <= limit


def test_a_model_that_leaves_no_memory_is_not_served(tiny_model_path: Path) -> None:
    with pytest.raises(ModelError, match="MEMORY_LIMIT_BYTES"):
        loaded(Settings(model_path=tiny_model_path, memory_limit_bytes=1))
