"""The model runner on real models, compared with mlx-lm's `generate`."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("mlx_lm")

from mlx_lm import generate, stream_generate
from mlx_lm.sample_utils import make_logits_processors

from shared.errors import JobFailure, PromptRefused
from shared.jobs.request import Request, Sampling
from shared.models.registry import ModelCard
from shared.settings import Settings
from tests.support.runner import GREEDY, alone, loaded, numbered, resumed, row, run, step
from worker.models.load import LoadedModel, load_model
from worker.runner.base import PrefillWork, StepPlan
from worker.runner.model_runner import MLXRunner

pytestmark = pytest.mark.usefixtures("own_data_dir")

CHUNK = 16
TOKEN_BYTES = 2 * 2 * 2 * 16 * 4
"""Cache bytes per token of the tiny model: keys and values, layers, heads, head size, bytes per number."""
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
def runner(tiny: LoadedModel) -> MLXRunner:
    return MLXRunner(tiny, CHUNK)


def tokens_of(runner: MLXRunner, steps: int) -> list[int]:
    """Run some steps and return their tokens."""
    return [output.token for _ in range(steps) for output in step(runner).tokens]


@pytest.mark.long
def test_greedy_rows_generate_the_text_of_mlx_lm(smollm2: LoadedModel) -> None:
    runner = MLXRunner(smollm2, 64)
    prompts = [chat(smollm2, question) for question in QUESTIONS]
    expected = [generate(smollm2.model, smollm2.tokenizer, prompt, max_tokens=14) for prompt in prompts]
    assert "Paris" in expected[0]
    rows = [row(uid, prompt, 14) for uid, prompt in enumerate(prompts)]
    late = {3: rows[3:5], 4: rows[5:6], 9: rows[6:]}
    for tokens in (run(runner, rows), run(runner, rows[:3], lambda steps: late.get(steps, ()))):
        assert [text(runner, tokens[uid]) for uid in range(len(rows))] == expected


def chat(model: LoadedModel, question: str) -> list[int]:
    message = {"role": "user", "content": question}
    return list(model.tokenizer.apply_chat_template([message], add_generation_prompt=True))


def text(runner: MLXRunner, tokens: Iterable[int]) -> str:
    """Return the text of an answer up to its end token."""
    detokenizer = runner.detokenizer()
    parts = []
    for token in tokens:
        if token in runner.eos:
            break
        parts.append(detokenizer.add(token))
    return "".join(parts) + detokenizer.finish()


def test_penalised_rows_generate_the_tokens_of_mlx_lm(tiny: LoadedModel, runner: MLXRunner) -> None:
    sampling = Sampling(0.0, repetition_penalty=1.4, presence_penalty=0.3, frequency_penalty=0.2)
    one = numbered(1, 30, 40, sampling)
    processors = make_logits_processors(repetition_penalty=1.4, presence_penalty=0.3, frequency_penalty=0.2)
    answer = stream_generate(tiny.model, tiny.tokenizer, list(one.prompt), 40, logits_processors=processors)
    expected = [response.token for response in answer]
    assert alone(runner, one)[: len(expected)] == expected


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_batched_rows_generate_the_same_tokens_as_single_rows(runner: MLXRunner, sampling: Sampling) -> None:
    one = numbered(1, 21, 16, sampling)
    expected = alone(runner, one)
    others = [numbered(10 + i, 1 + 7 * i, 3 + i, each) for i, each in enumerate(SAMPLINGS)]
    late = {2: [one], 3: others[3:5], 9: others[5:]}
    assert run(runner, others[:3], lambda steps: late.get(steps, ()))[1] == expected
    assert run(runner, [*others[:4], one, *others[4:]])[1] == expected
    assert run(runner, [*others[:2], one, *others[2:]], layers=1)[1] == expected


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_a_resumed_row_continues_with_the_same_tokens(runner: MLXRunner, sampling: Sampling) -> None:
    whole = numbered(0, 9, 12, sampling)
    expected = alone(runner, whole)
    tokens = run(runner, [resumed(whole, cut, expected[:cut]) for cut in range(12)])
    assert [tokens[cut] for cut in range(12)] == [expected[cut:] for cut in range(12)]


def test_a_step_that_does_not_run_ahead_gives_its_tokens_at_once(runner: MLXRunner) -> None:
    runner.insert([numbered(1, 5, max_new_tokens=2), numbered(2, 7, max_new_tokens=3)])
    first = step(runner, ahead=False)
    assert first.prefilled == {1: 0, 2: 0} and [each.uid for each in first.tokens] == [1, 2]
    assert [each.uid for each in step(runner, ahead=False).tokens] == [1, 2]
    assert [each.uid for each in step(runner, ahead=False).tokens] == [2], "the first row has reached its limit"
    assert not step(runner, ahead=False).tokens


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_steps_that_run_ahead_and_others_generate_the_same_tokens(runner: MLXRunner, sampling: Sampling) -> None:
    rows = [numbered(uid, 5 + 4 * uid, 6 + uid, sampling) for uid in range(1, 6)]
    expected = run(runner, rows)
    for ahead in (lambda _: False, lambda number: number % 2 == 0, lambda number: number % 3 == 0):
        later = {4: rows[3:]}
        assert run(runner, rows[:3], lambda number, later=later: later.get(number, ()), ahead=ahead) == expected


def test_rows_decode_while_others_are_prefilled(runner: MLXRunner) -> None:
    decoding, long = numbered(1, 5, 400), numbered(2, 20 * CHUNK)
    runner.insert([decoding])
    step(runner)
    runner.insert([long])
    for _ in range(20):
        output = step(runner)
        assert output.prompt_tokens <= CHUNK
        assert [each.uid for each in output.tokens] == [1]
    while not output.prefilled:
        output = step(runner)
    assert output.prefilled == {2: 0}
    assert [each.uid for each in output.tokens] == [1, 2]


def test_the_cache_of_a_long_prompt_is_allocated_at_once(runner: MLXRunner) -> None:
    runner.insert([numbered(1, 50 * CHUNK)])
    seen = []
    while not step(runner).prefilled:
        seen.append(runner.stats()["kv_bytes"])
    assert len(set(seen[1:])) == 1
    assert len(seen) >= 48


def test_short_prompts_are_prefilled_together(runner: MLXRunner) -> None:
    runner.insert([numbered(uid, 1 + uid) for uid in range(8)])
    assert step(runner).prompt_tokens == sum(range(8))
    output = step(runner)
    assert sorted(output.prefilled) == sorted(each.uid for each in output.tokens) == list(range(8))


def test_rows_can_be_removed_at_every_stage(runner: MLXRunner) -> None:
    """A removed row produces no further output and does not affect other rows."""
    stays = numbered(1, 20, 12, SAMPLINGS[3])
    expected = alone(runner, stays)
    for steps in range(8):
        removed = [numbered(2, 3 * CHUNK), numbered(3, 4), numbered(4, 1)]
        runner.insert([removed[0], stays, *removed[1:]])
        tokens = [each.token for _ in range(steps) for each in step(runner).tokens if each.uid == 1]
        runner.remove([2, 3, 4, 99])
        while len(tokens) < 12:
            output = step(runner)
            assert {each.uid for each in output.tokens} | set(output.prefilled) <= {1}
            tokens += [each.token for each in output.tokens]
        assert tokens == expected
        assert runner.stats()["kv_bytes"] == 0


def test_empty_batch_indices_are_reused_without_widening_the_cache(runner: MLXRunner) -> None:
    rows = [numbered(uid, 1 + uid * 7 % 40, 5 + uid % 9, SAMPLINGS[uid % len(SAMPLINGS)]) for uid in range(60)]
    expected = {each.uid: alone(runner, each) for each in rows[::6]}
    for each in rows[:8]:
        runner.insert([each])
    waiting = rows[8:]
    tokens: dict[int, list[int]] = defaultdict(list)
    max_bytes = 0.0
    while waiting or sum(map(len, tokens.values())) < sum(each.max_new_tokens for each in rows):
        for output in step(runner).tokens:
            tokens[output.uid].append(output.token)
            if len(tokens[output.uid]) == rows[output.uid].max_new_tokens and waiting:
                runner.insert([waiting.pop(0)])
        max_bytes = max(max_bytes, runner.stats()["kv_bytes"])
    assert {uid: tokens[uid] for uid in expected} == expected
    assert max_bytes <= 12 * TOKEN_BYTES * 768


def test_an_invalid_row_fails_without_affecting_others(runner: MLXRunner) -> None:
    good = numbered(1, 5)
    expected = alone(runner, good)
    bad = [
        replace(good, uid=2, prompt=()),
        replace(good, uid=3, prompt=(1, 10**6)),
        replace(good, uid=4, prompt=(-1,)),
        replace(good, uid=5, max_new_tokens=0),
        replace(good, uid=6, request=Request("m", 1, Sampling(float("nan")))),
        replace(good, uid=7, request=Request("m", 1, GREEDY, logprobs=21)),
    ]
    runner.insert([*bad[:2], good, *bad[2:]])
    runner.remove([6])
    assert [uid for uid, _ in step(runner).failed] == [2, 3, 4, 5, 7]
    assert tokens_of(runner, 13) == expected


def test_reset_drops_everything(runner: MLXRunner) -> None:
    one = numbered(1, 5)
    expected = alone(runner, one)
    runner.insert([numbered(2, 3 * CHUNK), numbered(3, 4), replace(one, uid=4, max_new_tokens=0)])
    step(runner)
    runner.reset()
    output = step(runner)
    assert not (output.tokens or output.failed or output.prefilled or runner.prefillable())
    assert alone(runner, one) == expected


def test_a_runner_works_on_a_thread_that_did_not_import_mlx(tiny_model_path: Path, runner: MLXRunner) -> None:
    one = numbered(1, 40)
    expected = alone(runner, one)
    results: list[list[int]] = []
    settings = Settings(model_path=tiny_model_path, prefill_step_tokens=CHUNK, prefix_disk_bytes=0)
    thread = threading.Thread(target=lambda: results.append(alone(loaded(settings), one)))
    thread.start()
    thread.join(60)
    assert results == [expected]


def test_invalid_prompts_are_refused(runner: MLXRunner) -> None:
    request = Request("m", 1, GREEDY, prompt="…")
    runner.card = replace(runner.card, context=10)
    assert runner.prompt(range(9), 4, request, {}).tokens == tuple(range(9))
    assert runner.prompt(range(9), 4, request, {}).shared == 4

    def code(tokens: Sequence[int], images: dict[str, bytes] | None = None) -> str:
        with pytest.raises(PromptRefused) as caught:
            runner.prompt(tokens, 0, request, images or {})
        return caught.value.code

    assert code(range(10)) == JobFailure.CONTEXT_LENGTH
    assert code([]) == code([10**6]) == code([2**31]) == code([1], {"a": b""}) == JobFailure.TEMPLATE


def test_the_detokenizer_streams_whole_characters(tiny: LoadedModel, runner: MLXRunner) -> None:
    for text in ("naïve 東京 🙂 family: 👨‍👩‍👧", "  two  spaces ", "one\n\ntwo\n"):
        detokenizer = runner.detokenizer()
        parts = [detokenizer.add(token) for token in tiny.tokenizer.encode(text, add_special_tokens=False)]
        parts.append(detokenizer.finish())
        assert "\ufffd" not in "".join(parts)
        # mlx-lm drops a leading space of the whole text.
        assert "".join(parts) == text


def test_the_model_card(tiny: LoadedModel) -> None:
    assert isinstance(tiny.card, ModelCard)
    assert (tiny.card.id, tiny.card.kind, tiny.card.context) == ("tiny-random-llama", "text", 8192)
    assert tiny.card.eos_token == "<|im_end|>"
    assert tiny.card.chat_template
    assert tiny.card.tokenizer is None, "the worker announces the tokenizer only after it was verified"
    assert tiny.tokenizer.eos_token_id in tiny.eos


def test_the_facts_and_the_measured_cost_of_the_model(runner: MLXRunner) -> None:
    assert {"device", "dtype", "parameters", "mlx", "mlx_lm"} <= runner.about.keys()
    assert runner.about["dtype"] == "float32"
    assert (runner.chunk, runner.depth) == (CHUNK, 1)
    runner.warm()
    assert runner.cost.seconds(CHUNK, 100) > 0


def test_an_empty_plan_starts_no_prefill(runner: MLXRunner) -> None:
    assert not runner.execute(StepPlan()).tokens
    runner.insert([numbered(1, 5)])
    assert not runner.execute(StepPlan()).tokens
    assert runner.execute(StepPlan(prefill=PrefillWork((1,)))).prompt_tokens == 4
