"""Rows of every architecture have the tokens and log-probabilities that they have alone, beside any others."""

from __future__ import annotations

import json
import random
import shutil
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mlx_lm")

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step

from shared.models.registry import ModelCard
from shared.settings import Settings
from tests.support.architectures import VOCABULARY, config, make, measured, names
from tests.support.runner import loaded, resumed, row, step
from worker.models.load import LoadedModel
from worker.runner import forward
from worker.runner.base import Row
from worker.runner.batching.support import UNRESTRICTED, BatchingSupport, Together
from worker.runner.kv_cache import Footprint, KVCache
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

OTHERS = ("qwen3", "gemma3_text", "gpt_oss", "deepseek_v3", "deepseek_v32", "mamba2", "qwen3_next", "lfm2", "falcon_h1")
"""One or two of each other kind."""

TYPES: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"dtype": mx.bfloat16},
    "4 bits": {"dtype": mx.bfloat16, "bits": 4},
}


@dataclass
class Answer:
    """Tokens of a row, and what the model thought of each."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


@pytest.mark.parametrize("name", [*RESTRICTED, *OTHERS])
def test_rows_are_the_same_beside_others(name: str) -> None:
    check(name, "float32")


@pytest.mark.long
@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("name", names())
def test_rows_of_all_architectures_are_the_same_beside_others(name: str, types: str) -> None:
    check(name, types)


@pytest.mark.parametrize("name", ["mamba", "afm7"])
def test_rows_differ_where_what_was_measured_is_ignored(name: str) -> None:
    with pytest.raises(AssertionError):
        compare_all(name, make(name), UNRESTRICTED)


@pytest.mark.parametrize("name", ["llama4", "gpt_bigcode", "deepseek_v41"])
def test_rows_that_cannot_share_a_pass_take_turns(name: str) -> None:
    runner = runner_of(name, make(name), RESTRICTED[name])
    rows = rows_of(LENGTHS)
    runner.insert(rows)
    told: set[int] = set()
    for _ in range(len(rows) + 2):
        told |= {each.uid for each in step(runner).tokens}
    assert told == set(range(len(rows)))
    assert runner.stats()["length_buckets"] == len(rows)


@pytest.mark.parametrize("tokens", [20, 300, 700])
@pytest.mark.parametrize("name", ["llama4", "deepseek_v41"])
def test_the_memory_of_a_row_without_a_batch_cache_is_predicted(name: str, tokens: int) -> None:
    model = make(name)
    cache = KVCache.empty(model)
    for _ in range(0, tokens, 20):
        forward.fill(model, cache, [[1] * 20])
    mx.eval(cache.states)
    assert cache.nbytes <= Footprint.of(model).allocated(tokens) <= 20 * cache.nbytes


@pytest.mark.parametrize("name", ["mamba", "gpt_bigcode"])
def test_a_folder_is_measured_when_it_is_loaded_first(name: str, tiny_model_path: Path, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / name, name, tiny_model_path)
    settings = Settings(
        model_path=folder, models_file=tmp_path / "none.toml", data_dir=tmp_path / "data", _env_file=None
    )
    found = loaded(settings).about["batching"]
    assert isinstance(found, dict)
    assert BatchingSupport.from_dict(found | {"reason": ""}) == RESTRICTED[name]
    (file,) = settings.batching_dir.iterdir()
    file.write_text(json.dumps(found | {"reason": "read"}))
    assert loaded(settings).about["batching"] == found | {"reason": "read"}


def make_folder(folder: Path, name: str, tiny_model_path: Path) -> Path:
    """A model's folder, with the tokenizer of the tiny model."""
    folder.mkdir()
    for file in tiny_model_path.glob("*token*"):
        shutil.copy(file, folder)
    vocabulary = json.loads((tiny_model_path / "config.json").read_text())["vocab_size"]
    (folder / "config.json").write_text(json.dumps(config(name) | {"vocab_size": vocabulary}))
    weights = dict(tree_flatten(make(name, vocab_size=vocabulary).parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    return folder


def check(name: str, types: str) -> None:
    model = make_or_skip(name, types)
    found = measured(model)
    expected = RESTRICTED.get(name, UNRESTRICTED)
    assert replace(found, reason="") == expected
    assert bool(found.reason) == expected.restricted
    if types == "float32":
        compare_all(name, model, found)
    else:  # a token that is prefilled again is rounded otherwise than when it was decoded
        compare_all(name, model, found, TOLERANCE_SHORT, cut=())


def compare_all(
    name: str, model: Any, batching: BatchingSupport, tolerance: float = TOLERANCE, *, cut: Sequence[int] = (0, 2)
) -> None:
    rows = rows_of(LENGTHS)
    answers = together(runner_of(name, model, batching), rows, cut)
    for each in rows:
        compare(model, each.prompt, answers[each.uid], tolerance)


def rows_of(lengths: Sequence[int]) -> list[Row]:
    draw = random.Random(3)
    prompts = [[draw.randrange(VOCABULARY) for _ in range(length)] for length in lengths]
    return [row(uid, prompt, TOKENS, owner="me", logprobs=0) for uid, prompt in enumerate(prompts)]


def make_or_skip(name: str, types: str) -> Any:
    try:
        model = make(name, **TYPES[types])
        mx.eval(model(mx.array([[1, 2, 3]])))
    except (RuntimeError, TypeError) as error:  # a CPU has no experts of 16 bits, and one model cannot be packed
        if types == "float32":
            raise
        pytest.skip(str(error))
    return model


def runner_of(name: str, model: Any, found: BatchingSupport) -> MLXRunner:
    card = ModelCard(name, "text", 512, vocabulary=config(name)["vocab_size"])
    of = LoadedModel(model, None, config(name), card, frozenset())
    return MLXRunner(of, CHUNK, Memory(2**30, 2**28), batching=found, speculation_tokens=4)


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
    expected = generate_step(mx.array(list(prompt)), model, max_tokens=TOKENS)
    for (token, logprobs), said, logprob in zip(expected, answer.tokens, answer.logprobs, strict=True):
        assert logprobs[said].item() == pytest.approx(logprob, abs=tolerance)
        assert (logprobs[int(token)] <= logprobs[said] + tolerance).item()
        if said != int(token):
            break
