"""Prefixes of every kind of architecture: how much rows reuse, from memory and from disk, with the same logits."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("mlx_lm")

import mlx.core as mx
from mlx_lm.generate import generate_step

from shared.models.registry import ModelCard
from tests.support.architecture_configs import VOCABULARY, config
from tests.support.architectures import make, measured, names
from tests.support.runner import plan, row, step
from tests.support.waiting import eventually
from worker.models.load import LoadedModel
from worker.runner import decode, prefill
from worker.runner.batching.proof import CannotRun
from worker.runner.batching.support import UNRESTRICTED, BatchingSupport
from worker.runner.memory import Memory
from worker.runner.model_runner import MLXRunner
from worker.runner.prefix.blocks import BLOCK
from worker.runner.prefix.checkpoints import TAIL
from worker.runner.prefix.files import PrefixFiles
from worker.runner.prefix.spill import Spill
from worker.runner.quantized_cache import quantize_cache

CHUNK = 64
PLENTY = 2**28
TOKENS = 6
TOLERANCE, TOLERANCE_QUANTIZED = 2e-3, 0.1
"""Differences of log-probabilities that are rounding. It may change the last bit of a quantised number."""

KINDS = (
    *("llama", "deepseek_v3", "longcat_flash", "gemma3_text", "gemma3n", "qwen3_5", "mamba2"),
    *("gemma3_text KV4", "qwen3_5 KV8"),
)
"""One or two of each kind: plain, latent, lists of plain caches, sliding windows, hybrids, recurrent only; and with
quantised keys and values."""
OTHERS = ("deepseek_v32", "gpt_oss", "exaone4", "qwen3_next", "falcon_h1", "lfm2", "kimi_linear", "llama KV8")
"""More of the same kinds. `tests/architectures` has most of them by default."""
UNMEASURED = (*KINDS, *OTHERS)
"""Known to have no restrictions."""
LONG = (*OTHERS, *(name for name in names() if name not in UNMEASURED))


@pytest.fixture(params=[*KINDS, *(pytest.param(name, marks=pytest.mark.long) for name in LONG)])
def kind(request: pytest.FixtureRequest) -> Kind:
    return Kind(request.param)


class Kind:
    """A tiny model of an architecture.

    Args:
        name: the architecture, and perhaps the bits of its keys and values.

    Attributes:
        recurrent: whether rows can begin only at checkpoints.
    """

    def __init__(self, name: str) -> None:
        self.name, _, bits = name.partition(" KV")
        self.tolerance = TOLERANCE_QUANTIZED if bits else TOLERANCE
        try:
            self.model = make(self.name, **({"head_dim": 32} if bits else {}))
            if bits:
                quantize_cache(self.model, int(bits))
            self.batching: BatchingSupport = measured(self.model) if name not in UNMEASURED else UNRESTRICTED
        except (CannotRun, RuntimeError, TypeError) as error:
            pytest.skip(str(error))
        if not self.batching.continues:
            pytest.skip("its prefixes are not reused")
        runner = self.runner()
        if runner._prefixes.layout is None:
            pytest.skip("mlx-lm has no batch cache for it")
        self.recurrent = runner._prefixes.recurrent

    def runner(self, folder: Path | None = None) -> MLXRunner:
        spill = None
        if folder is not None:
            spill = Spill(PrefixFiles(folder, "model", PLENTY, 1e6), PLENTY // 8)
            spill.open()
        card = ModelCard(self.name, "text", 8192, vocabulary=config(self.name)["vocab_size"])
        loaded = LoadedModel(self.model, None, config(self.name), card, frozenset())
        return MLXRunner(loaded, CHUNK, Memory(2**30, PLENTY), spill, batching=self.batching, speculation_tokens=4)

    def reused(self, length: int) -> int:
        """Return how many of the first `length` tokens of an earlier prompt another one reuses."""
        return length - length % BLOCK if self.recurrent else length


def prompt(length: int, seed: int = 1) -> tuple[int, ...]:
    draw = random.Random(seed)
    return tuple(draw.randrange(VOCABULARY) for _ in range(length))


def answer(runner: MLXRunner, kind: Kind, *prompts: Sequence[int]) -> list[int]:
    """Run prompts together, and compare their log-probabilities with mlx-lm's. Returns the reused tokens of each."""
    runner.insert([row(uid, each, TOKENS, owner="me", logprobs=0) for uid, each in enumerate(prompts)])
    outputs: dict[int, list[tuple[int, float]]] = {uid: [] for uid in range(len(prompts))}
    reused: dict[int, int] = {}
    while any(len(output) < TOKENS for output in outputs.values()):
        result = step(runner)
        assert not result.failed
        reused |= result.prefilled
        for each in result.tokens:
            assert each.logprob is not None
            outputs[each.uid].append((each.token, each.logprob))
    runner.remove(outputs)
    for uid, each in enumerate(prompts):
        compare(kind, each, outputs[uid])
    return [reused[uid] for uid in outputs]


def compare(kind: Kind, prompt: Sequence[int], output: Sequence[tuple[int, float]]) -> None:
    """Compare with mlx-lm's own loop, up to a choice between tokens that are equally probable."""
    for (token, logprobs), (chosen, logprob) in zip(
        generate_step(mx.array(list(prompt)), kind.model, max_tokens=TOKENS), output, strict=True
    ):
        assert logprobs[chosen].item() == pytest.approx(logprob, abs=kind.tolerance)
        if chosen != int(token):
            break


def test_a_shared_beginning_is_reused(kind: Kind) -> None:
    runner, shared = kind.runner(), prompt(230)
    others = [(*shared, *prompt(60, seed)) for seed in range(2, 6)]
    assert answer(runner, kind, others[0]) == [0]
    assert answer(runner, kind, others[1]) == [kind.reused(230)]
    assert answer(runner, kind, others[2]) == [230]  # the second prompt took a checkpoint where it left the first one
    assert answer(runner, kind, others[3], others[0]) == [230, 289]


def test_long_prompts_share_their_beginning(kind: Kind) -> None:
    runner, shared = kind.runner(), prompt(700)
    answer(runner, kind, (*shared, *prompt(90, 2)))
    assert answer(runner, kind, (*shared, *prompt(80, 3)), (*shared[:333], *prompt(40, 4))) == [
        kind.reused(700),
        kind.reused(333),
    ]


def test_the_next_turn_reuses_a_conversation_without_its_thoughts(kind: Kind) -> None:
    runner, first = kind.runner(), prompt(180)
    answer(runner, kind, first)
    second = (*first[:-4], *prompt(50, 2))
    assert answer(runner, kind, second) == [180 - (TAIL if kind.recurrent else 4)]
    third = (*second[:-4], *prompt(50, 3))
    assert answer(runner, kind, third) == [226 - (TAIL if kind.recurrent else 4)]


def test_the_next_turn_reuses_a_whole_answer(kind: Kind) -> None:
    runner, first = kind.runner(), prompt(100)
    runner.insert([row(1, first, 160, owner="me")])
    tokens: list[int] = []
    while len(tokens) < 160:
        tokens += [each.token for each in step(runner).tokens]
    runner.remove([1])
    assert answer(runner, kind, (*first, *tokens, 7, 8, 9)) == [259]


def test_a_new_worker_reads_a_long_prompt_from_disk(
    kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first worker is not closed, as if it had been killed."""
    monkeypatch.setattr(prefill, "SAVED_TOKENS", 1000)
    long = prompt(1000)
    first = kind.runner(tmp_path)
    answer(first, kind, (*long, *prompt(20, 2)))
    first.set_prefix_limit(PLENTY)
    spill = first._prefixes._spill
    assert spill is not None
    eventually(lambda: not spill.pending_bytes, "prefixes are written", 20)
    (reused,) = answer(kind.runner(tmp_path), kind, (*long, *prompt(20, 4)))
    assert 800 < reused <= 1000
    spill.close(1)


def test_a_new_worker_continues_a_long_answer(kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first worker is not closed, as if it had been killed while the row decoded."""
    monkeypatch.setattr(decode, "SAVED_TOKENS", BLOCK)
    first, tokens = kind.runner(tmp_path), list[int]()
    first.insert([row(1, prompt(100), 600, owner="me")])
    while len(tokens) < 200:
        tokens += [each.token for each in first.execute(replace(plan(first), speculate=True)).tokens]
    first.set_prefix_limit(PLENTY)
    spill = first._prefixes._spill
    assert spill is not None
    eventually(lambda: not spill.pending_bytes, "the row is written", 20)
    (reused,) = answer(kind.runner(tmp_path), kind, (*prompt(100), *tokens))
    assert reused >= 2 * BLOCK
    spill.close(1)


def test_a_new_worker_reads_everything_after_a_shutdown(kind: Kind, tmp_path: Path) -> None:
    long = prompt(500)
    first = kind.runner(tmp_path)
    answer(first, kind, long)
    first._prefixes.close(20)
    (reused,) = answer(kind.runner(tmp_path), kind, (*long, 1, 2, 3))
    assert reused >= (499 if kind.recurrent else 3 * BLOCK)
