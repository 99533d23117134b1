"""Rows with different LoRA adapters share a batch, and each has the logits of its own adapter alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import pytest

pytest.importorskip("mlx_lm")

import mlx.core as mx
from mlx.utils import tree_unflatten
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load_model

from shared.models.catalog import CatalogModel
from tests.support.adapters import (
    finished,
    load_all,
    loading,
    row_with,
    runner_with,
    write_adapter,
    write_as_peft,
    write_for,
)
from tests.support.architectures import make
from tests.support.runner import run, step
from worker.runner import forward, release
from worker.runner.adapters import slots
from worker.runner.adapters.opening import opening
from worker.runner.base import AdapterFailed, OutOfMemory, Row
from worker.runner.kv_cache import KVCache
from worker.runner.model_runner import MLXRunner
from worker.runner.speculation.pass_cost import UNKNOWN

pytestmark = pytest.mark.usefixtures("own_data_dir")

TOKENS = 12
Output: TypeAlias = tuple[list[int], list[float]]
"""The tokens of a row, and their log-probabilities."""
EMBEDDINGS = ("self_attn.v_proj", "model.embed_tokens")


def prompt(number: int, length: int) -> list[int]:
    return [(number * 977 + i * 131) % 40_000 + 100 for i in range(length)]


@pytest.fixture(scope="module")
def base(tiny_model_path: Path) -> Path:
    return tiny_model_path


@pytest.fixture(scope="module")
def folders(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Eight adapters: of different ranks, of one layer or two, of embeddings, and in PEFT's format."""
    home = tmp_path_factory.mktemp("adapters")
    found = {f"a{n}": write_adapter(base, home / f"a{n}", seed=n, rank=2 + n, layers=1 + n % 2) for n in range(6)}
    found["a6"] = write_adapter(base, home / "a6", seed=6, keys=EMBEDDINGS)
    found["a7"] = write_as_peft(found["a0"], home / "a7")
    return found


def original(folders: dict[str, Path], name: str | None) -> Path | None:
    """The folder from which mlx-lm can read an adapter."""
    return folders["a0" if name == "a7" else name] if name else None


@pytest.fixture(scope="module")
def runner(base: Path, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> MLXRunner:
    return runner_with(base, folders, adapter_bytes=2**28, data_dir=tmp_path_factory.mktemp("data"))


def adapted(base: Path, adapter: Path | None) -> Any:
    """The model of mlx-lm with an adapter."""
    model, _ = load_model(base)
    if adapter is not None:
        load_adapters(model, str(adapter))
        model.eval()
    return model


def fused(model: Any) -> Any:
    """Merge the adapter of a model into its weights; return the model."""
    layers = [(path, each.fuse()) for path, each in model.named_modules() if hasattr(each, "fuse")]
    model.update_modules(tree_unflatten(layers))
    return model


def assert_model_gives(model: Any, row: Row, found: Output) -> None:
    """Check that a model of mlx-lm gives the same greedy tokens and log-probabilities."""
    tokens, logprobs = found
    logits = model(mx.array([[*row.prompt, *tokens[:-1]]]))[0, -len(tokens) :]
    best = mx.argmax(logits, axis=-1)
    assert best.tolist() == tokens
    chosen = mx.take_along_axis(logits, best[:, None], axis=-1)[:, 0] - mx.logsumexp(logits, axis=-1)
    assert logprobs == pytest.approx(chosen.tolist(), abs=2e-4)


def outputs(
    runner: MLXRunner, rows: Sequence[Row], joins: Callable[[int], Sequence[Row]] = lambda _: ()
) -> dict[int, Output]:
    """The tokens of rows and their log-probabilities, by uid."""
    logprobs: dict[int, list[float]] = {}
    execute = runner.execute

    def recording(plan: Any) -> Any:
        output = execute(plan)
        for each in output.tokens:
            logprobs.setdefault(each.uid, []).append(each.logprob or 0.0)
        return output

    runner.execute = recording  # type: ignore[method-assign]
    try:
        tokens = run(runner, rows, joins)
    finally:
        del runner.execute
    runner.remove(tokens)
    return {uid: (tokens[uid], logprobs[uid]) for uid in tokens}


def assert_same(found: Output, expected: Output) -> None:
    assert found[0] == expected[0]
    assert found[1] == pytest.approx(expected[1], abs=2e-4)


def test_rows_with_eight_adapters_get_what_each_gets_alone_and_from_mlx_lm(
    base: Path, folders: dict[str, Path], runner: MLXRunner
) -> None:
    assert runner.card.adapters == dict.fromkeys(folders, "")
    names = [None, *folders, None, "a1"]
    lengths = [7 + 13 * n for n in range(len(names) - 1)] + [5 * runner.chunk + 3]
    rows = [
        row_with(name, n, prompt(n, length), TOKENS)
        for n, (name, length) in enumerate(zip(names, lengths, strict=True), 1)
    ]
    first, late = rows[:5], rows[5:]
    together = outputs(runner, first, lambda step: late[step // 2 : step // 2 + 1] if step % 2 == 0 else ())
    for row in rows:
        alone = outputs(runner, [replace(row, uid=100 + row.uid)])[100 + row.uid]
        assert_same(together[row.uid], alone)
        assert_model_gives(adapted(base, original(folders, row.request.adapter)), row, alone)
    same_prompt = [row_with(name, n, rows[0].prompt, TOKENS) for n, name in enumerate((None, "a1", "a2", "a6"), 1)]
    answers = {tuple(tokens) for tokens, _ in outputs(runner, same_prompt).values()}
    assert len(answers) == 4, "the adapters change the text"


def test_a_fused_model_answers_the_same(base: Path, folders: dict[str, Path], runner: MLXRunner) -> None:
    model = fused(adapted(base, folders["a3"]))
    row = row_with("a3", 1, prompt(3, 30), TOKENS)
    assert_model_gives(model, row, outputs(runner, [row])[1])


def test_plain_rows_run_the_same_operations_as_without_adapters(base: Path, runner: MLXRunner) -> None:
    rows = [row_with(None, n, prompt(n, 20 + n), TOKENS) for n in range(1, 5)]
    assert outputs(runner, rows) == outputs(runner_with(base, {}), rows), "equal to the last bit"
    mixed = outputs(runner, [*rows, row_with("a2", 9, prompt(9, 22), TOKENS)])
    for row in rows:
        assert_same(mixed[row.uid], outputs(runner, [row])[row.uid])


def test_speculation_verifies_with_the_adapter(
    base: Path, folders: dict[str, Path], runner: MLXRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A repeated prompt has drafts, which rows without log-probabilities verify."""
    monkeypatch.setattr(runner._speculation, "cost", UNKNOWN)  # so that drafts pay on any machine
    names = ("a2", None, "a5")
    repeated = prompt(1, 12) * 4
    rows = [row_with(name, n, repeated, 40) for n, name in enumerate(names, 1)]
    plain = [replace(row, request=replace(row.request, logprobs=None)) for row in rows]
    before = runner.stats()["speculation_drafted_tokens_total"]
    found = run(runner, plain)
    runner.remove(found)
    expected = outputs(runner, rows)
    for row in rows:
        assert found[row.uid] == expected[row.uid][0]
        assert_model_gives(adapted(base, original(folders, row.request.adapter)), row, expected[row.uid])
    assert runner.stats()["speculation_drafted_tokens_total"] > before


def test_a_row_continues_after_its_tokens_on_another_worker(runner: MLXRunner) -> None:
    row = row_with("a4", 1, prompt(4, 40), TOKENS)
    whole = outputs(runner, [row])[1]
    rest = replace(row, uid=2, prompt=(*row.prompt, *whole[0][:5]), generated=5, max_new_tokens=TOKENS - 5)
    assert_same(outputs(runner, [rest])[2], (whole[0][5:], whole[1][5:]))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {"bits": 4}),
        ("llama", {"bits": 4, "tie_word_embeddings": True}),
        ("qwen2_moe", {}),
        ("qwen2_moe", {"bits": 4}),
    ],
)
def test_quantised_layers_experts_and_output_embeddings(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Prompts of 40 tokens are long enough for mlx-lm to sort them by expert."""
    ids = [[(7 * k + 3 * n + 1) % 256 for k in range(40)] for n in range(3)]
    adapted = [make(name, **options) for _ in range(2)]
    for n, model in enumerate(adapted):
        keys = EMBEDDINGS if "tie_word_embeddings" in options else None
        write_for(model, tmp_path / f"a{n}", seed=n, rank=2 + 3 * n, keys=keys)
    base, plain = make(name, **options), make(name, **options)
    found = finished(opening(base, {f"a{n}": tmp_path / f"a{n}" for n in range(2)}, 64, 2**28, 256))
    assert found.announced == {"a0": "", "a1": ""}
    placed = load_all(found, ("a0", "a1"))
    order = [placed["a1"], 0, placed["a0"]]
    for width in (40, 1):
        rows = [each[:width] for each in ids]
        logits = forward.fill(base, KVCache.empty(base, 3), rows, slots=forward.slot_array(order))
        expected = [model(mx.array([row])) for model, row in zip((adapted[1], plain, adapted[0]), rows, strict=True)]
        assert logits is not None
        for row in range(3):
            assert mx.allclose(logits[row], expected[row][0], rtol=1e-3, atol=1e-3 * mx.std(expected[row]).item())
    assert not mx.allclose(plain(mx.array([ids[0]])), adapted[1](mx.array([ids[0]])), atol=0.1)


def slot_bytes(runner: MLXRunner) -> int:
    return runner._adapters.nbytes // (runner.adapter_slots + 1)


def test_adapters_replace_the_least_recently_used_within_the_memory(
    base: Path, folders: dict[str, Path], runner: MLXRunner
) -> None:
    few = runner_with(base, folders, adapter_bytes=3 * slot_bytes(runner) + 1)
    assert few.adapter_slots == 2
    for name in ("a1", "a2", "a1", "a3", "a1", "a2"):
        row = row_with(name, 1, prompt(2, 20), TOKENS)
        assert_same(outputs(few, [row])[1], outputs(runner, [row])[1])
    stats = few.stats()
    assert (stats["adapter_loads_total"], stats["adapter_evictions_total"]) == (4, 2), "a1 stayed: it was used"


def test_the_memory_of_adapters_is_reserved_when_the_model_is_loaded(base: Path, folders: dict[str, Path]) -> None:
    release()
    before = mx.get_active_memory()
    runner = runner_with(base, folders, adapter_bytes=2**28)
    release()
    held = mx.get_active_memory() - before
    assert held == pytest.approx(runner.weights_bytes, abs=2**20)
    assert runner.stats()["adapter_bytes"] > 4 * 2**20
    outputs(runner, [row_with(name, n, prompt(n, 9), 2) for n, name in enumerate(list(folders)[:3], 1)])
    release()
    assert mx.get_active_memory() - before == pytest.approx(held, abs=2**20)


def test_an_adapter_in_use_is_never_replaced(base: Path, folders: dict[str, Path], runner: MLXRunner) -> None:
    one = runner_with(base, folders, adapter_bytes=2 * slot_bytes(runner))
    long, other = row_with("a1", 1, prompt(1, 20), 30), row_with("a2", 2, prompt(2, 20), 3)
    one.insert([long, other])  # the scheduler would not admit the second row
    tokens: dict[int, list[int]] = {1: [], 2: []}
    while len(tokens[2]) < 3:
        output = step(one)
        for each in output.tokens:
            tokens[each.uid].append(each.token)
        if len(tokens[1]) == 30:
            one.remove([1])
        else:
            assert not tokens[2]
    assert tokens[1] == outputs(runner, [long])[1][0]
    assert tokens[2] == outputs(runner, [other])[2][0]


def test_other_rows_decode_while_an_adapter_is_loaded(
    base: Path, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots, "PIECE_BYTES", 1)
    fresh = runner_with(base, folders, adapter_bytes=2**28)
    fresh.insert([row_with(None, 1, prompt(1, 8), 200)])
    while not step(fresh).tokens:
        pass
    fresh.insert([row_with("a5", 2, prompt(2, 8), 3)])
    decoded = 0
    while 2 not in fresh.prefillable():
        decoded += len(step(fresh).tokens)
    assert decoded >= len(fresh._adapters._tables), "a step for each table at least"
    fresh.remove([1, 2])


def test_an_adapter_that_was_loaded_only_in_part_is_loaded_again(
    base: Path, folders: dict[str, Path], runner: MLXRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = row_with("a5", 1, prompt(6, 15), TOKENS)
    expected = outputs(runner, [row])[1]
    fresh = runner_with(base, folders, adapter_bytes=2**28)

    def no_memory(*_arguments: Any) -> None:
        raise RuntimeError("[malloc] Unable to allocate 4096 bytes")

    with monkeypatch.context() as patch:
        patch.setattr([*fresh._adapters._tables.values()][-1], "write", no_memory)
        with pytest.raises(OutOfMemory):
            run(fresh, [row])
    fresh.reset()
    assert_same(outputs(fresh, [row])[1], expected)


def test_rows_reuse_only_prefixes_of_their_own_adapter(base: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    text = prompt(5, 300)

    def cached(runner: MLXRunner, adapter: str | None, owner: str = "me") -> int:
        runner.insert([replace(row_with(adapter, 1, text, 2), owner=owner, shared=64)])
        reported, done = 0, 0
        while done < 2:
            output = step(runner)
            reported += output.prefilled.get(1, 0)
            done += len(output.tokens)
        runner.remove([1])
        return reported

    settings = {"adapter_bytes": 2**28, "data_dir": tmp_path, "prefix_disk_bytes": 2**30}
    first = runner_with(base, folders, **settings)
    assert [cached(first, name) for name in ("a1", "a2", None)] == [0, 0, 0]
    assert [cached(first, name) for name in ("a1", "a2", None)] == [299, 299, 299]
    assert [cached(first, name, "you") for name in ("a1", "a3", None)] == [64, 0, 64], "the shared part"
    first.close()
    restarted = runner_with(base, folders, **settings)
    assert [cached(restarted, name) for name in ("a1", "a4", "a2", None)] == [256, 0, 256, 256]


def failure(runner: MLXRunner, adapter: str) -> str:
    runner.insert([row_with(adapter, 1, prompt(1, 9), 3)])
    while not (failed := step(runner).failed):
        pass
    ((uid, error),) = failed
    assert uid == 1 and isinstance(error, AdapterFailed)
    return str(error)


def test_adapters_that_do_not_fit_are_announced_with_the_reason(
    base: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    write_for(make("llama", hidden_size=128, num_hidden_layers=2), tmp_path / "wide", layers=1)
    write_for(make("mamba"), tmp_path / "mamba", layers=1)
    shutil.copytree(folders["a1"], tmp_path / "dora")
    settings = json.loads((tmp_path / "dora/adapter_config.json").read_text())
    (tmp_path / "dora/adapter_config.json").write_text(json.dumps({**settings, "fine_tune_type": "dora"}))
    write_adapter(base, tmp_path / "rank", rank=65)
    names = ("wide", "mamba", "dora", "rank", "missing")
    runner = runner_with(base, {"good": folders["a1"], **{name: tmp_path / name for name in names}})
    problems = runner.card.adapters or {}
    assert problems.pop("good") == ""
    assert "128 inputs" in problems["wide"] and "trained for another base model" in problems["wide"]
    assert "the model has no layer" in problems["mamba"] and "another base model" in problems["mamba"]
    assert "it is a DoRA" in problems["dora"]
    assert "its rank is 65, more than the limit of 64" in problems["rank"]
    assert problems["missing"] == "missing has no adapter_config.json"
    assert not [problem for problem in problems.values() if str(tmp_path) in problem]
    assert "it is a DoRA" in failure(runner, "dora")
    assert failure(runner, "nobody") == "the worker does not have it"
    runner.insert([row_with("dora", 2, prompt(2, 9), 3)])
    runner.remove([2])
    assert not step(runner).failed, "the row was removed before it could fail"


def test_adapters_that_no_slot_can_hold_are_refused(base: Path, folders: dict[str, Path]) -> None:
    small = slot_bytes(runner_with(base, {"a1": folders["a1"]}, adapter_bytes=2**28))
    runner = runner_with(base, {"large": folders["a6"], "small": folders["a1"]}, adapter_bytes=2 * small)
    problems = runner.card.adapters or {}
    assert (problems["small"], runner.adapter_slots) == ("", 1)
    assert "(ADAPTER_BYTES)" in problems["large"]
    none = runner_with(base, folders, adapter_bytes=10)
    assert (none.adapter_slots, none._adapters.nbytes) == (0, 0)
    assert all("(ADAPTER_BYTES)" in problem for problem in (none.card.adapters or {}).values())


def test_files_that_changed_since_the_model_was_loaded_are_checked_again(
    base: Path, folders: dict[str, Path], runner: MLXRunner, tmp_path: Path
) -> None:
    copies = {name: Path(shutil.copytree(folders[name], tmp_path / name)) for name in ("a1", "a2", "a3")}
    changing = runner_with(base, copies, adapter_bytes=2**28)
    shutil.copytree(folders["a0"], copies["a2"], dirs_exist_ok=True)
    row = row_with("a2", 1, prompt(3, 15), TOKENS)
    expected = outputs(runner, [replace(row, request=replace(row.request, adapter="a0"))])[1]
    assert_same(outputs(changing, [row])[1], expected)
    shutil.copytree(folders["a5"], copies["a3"], dirs_exist_ok=True)
    assert failure(changing, "a3") == "it has changed and needs more memory than before; load the model again"
    weights = copies["a1"] / "adapters.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    assert "adapters.safetensors has" in failure(changing, "a1")
    assert_same(outputs(changing, [row])[1], expected)


def test_an_adapter_of_the_request_is_added_to_that_of_the_catalog_entry(base: Path, folders: dict[str, Path]) -> None:
    runner = finished(loading(CatalogModel("m", base, "text", adapter=folders["a1"], adapters={"a2": folders["a2"]})))
    assert runner.card.adapters == {"a2": ""}
    model = fused(adapted(base, folders["a1"]))
    rows = [row_with(name, n, prompt(3, 30), TOKENS) for n, name in enumerate((None, "a2"), 1)]
    found = outputs(runner, rows)
    assert_model_gives(model, rows[0], found[1])
    load_adapters(model, str(folders["a2"]))
    model.eval()
    assert_model_gives(model, rows[1], found[2])
