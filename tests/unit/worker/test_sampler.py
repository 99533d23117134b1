"""Sampling and penalties on tiny vocabularies, compared with mlx-lm and with the expected distribution."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, cast

import pytest

mx = pytest.importorskip("mlx.core")

from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p, make_logits_processors  # noqa: E402

from shared.jobs.request import Sampling  # noqa: E402
from tests.support.runner import row as row_of  # noqa: E402
from worker.runner.logits.penalties import WINDOW, BatchPenalties, Penalties  # noqa: E402
from worker.runner.logits.processor import LogitsPipeline  # noqa: E402
from worker.runner.sampler import BatchSampler, gumbel, min_p_threshold, top_k_threshold, top_p_threshold  # noqa: E402

VOCABULARY = 12
SAMPLES = 4000
CHI2_999 = {1: 10.83, 2: 13.82, 3: 16.27, 4: 18.47, 5: 20.52, 6: 22.46, 7: 24.32, 8: 26.12, 9: 27.88, 10: 29.59}
"""Chi-square quantiles by degrees of freedom: a correct sampler exceeds them for one in a thousand seeds."""

FILTERS: list[dict[str, Any]] = [
    {},
    {"top_p": 0.7},
    {"top_k": 3},
    {"min_p": 0.2},
    {"top_p": 0.9, "top_k": 5},
    {"top_p": 0.95, "min_p": 0.05, "top_k": 4},
]


def logits(rows: int = 1, seed: int = 0) -> Any:
    return mx.random.normal((rows, VOCABULARY), key=mx.random.key(seed)) * 2


def sample(sampler: BatchSampler, values: Any, positions: Sequence[int]) -> list[int]:
    return cast("list[int]", sampler(values, positions).tolist())


def reference(values: Any, temperature: float, top_p: float = 1, min_p: float = 0, top_k: int = 0) -> Any:
    """Return the probabilities after mlx-lm's filters, applied in mlx-lm's order."""
    values = values - mx.logsumexp(values, axis=-1, keepdims=True)
    if top_p < 1:
        values = apply_top_p(values, top_p)
    if min_p > 0:
        values = apply_min_p(values, min_p)
    if top_k > 0:
        values = apply_top_k(values, top_k)
    return mx.softmax(values / temperature, axis=-1)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_samples_follow_the_distribution_of_mlx_lm(filters: dict[str, Any], temperature: float) -> None:
    values = logits()
    expected = reference(values, temperature, **filters)[0].tolist()
    sampler = BatchSampler([Sampling(temperature, seed=seed, **filters) for seed in range(SAMPLES)])
    counts = Counter(sample(sampler, mx.repeat(values, SAMPLES, axis=0), [3] * SAMPLES))
    assert {token for token in counts if expected[token] == 0} == set()
    likely = [token for token, p in enumerate(expected) if p * SAMPLES >= 5]
    chi2 = sum((counts[token] - SAMPLES * expected[token]) ** 2 / (SAMPLES * expected[token]) for token in likely)
    assert chi2 < CHI2_999[max(1, min(10, len(likely) - 1))]


def test_successive_positions_of_one_seed_are_independent() -> None:
    values = mx.zeros((SAMPLES, 2))
    tokens = sample(BatchSampler([Sampling(1.0, seed=7)] * SAMPLES), values, range(SAMPLES))
    pairs = Counter(pairwise(tokens))
    expected = (SAMPLES - 1) / 4
    assert sum((pairs[a, b] - expected) ** 2 / expected for a in (0, 1) for b in (0, 1)) < CHI2_999[3]


@pytest.mark.parametrize(
    ("threshold", "value", "library"),
    [
        *((top_p_threshold, p, apply_top_p) for p in (0.05, 0.5, 0.9, 0.999)),
        *((min_p_threshold, p, apply_min_p) for p in (0.01, 0.1, 0.9)),
        *((top_k_threshold, k, apply_top_k) for k in (1, 4, VOCABULARY - 1)),
    ],
)
def test_filters_keep_what_mlx_lm_keeps(threshold: Any, value: float, library: Any) -> None:
    values = logits(rows=64)
    options = {"max_k": value} if threshold is top_k_threshold else {}
    kept = values >= threshold(values, mx.full((64, 1), value), **options)
    expected = library(values - mx.logsumexp(values, axis=-1, keepdims=True), value) > -mx.inf
    assert mx.array_equal(kept, expected)


def test_top_k_above_the_vocabulary_size_keeps_all_tokens() -> None:
    values = logits()
    threshold = top_k_threshold(values, mx.array([[VOCABULARY + 5]]), max_k=VOCABULARY + 5)
    assert threshold.item() == mx.min(values).item()


def test_the_most_likely_token_is_kept_for_any_top_p() -> None:
    sampler = BatchSampler([Sampling(2.0, top_p=1e-9, seed=s) for s in range(8)])
    values = logits(rows=8)
    assert mx.array_equal(sampler(values, [0] * 8), mx.argmax(values, axis=-1))


@pytest.mark.parametrize("temperature", [0.0, 1e-9, 1e-4])
def test_a_temperature_near_zero_is_greedy(temperature: float) -> None:
    values = logits(rows=8)
    chosen = BatchSampler([Sampling(temperature, seed=5)] * 8)(values, [0] * 8)
    assert mx.array_equal(chosen, mx.argmax(values, axis=-1))


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_a_row_samples_the_same_token_in_any_batch(filters: dict[str, Any]) -> None:
    rows = [Sampling(1.0, seed=100 + i, **filters) if i % 3 else Sampling(0.0) for i in range(64)]
    values, positions = logits(rows=64), list(range(64))
    together = BatchSampler(rows)(values, positions).tolist()
    single = [BatchSampler([rows[i]])(values[i : i + 1], [positions[i]]).item() for i in range(64)]
    assert together == single


def test_noise_depends_only_on_the_key() -> None:
    keys = mx.array([[i, 7] for i in range(64)], dtype=mx.uint32)
    each = mx.concatenate([gumbel(keys[i : i + 1], 100) for i in range(64)])
    assert mx.array_equal(gumbel(keys, 100), each)


def test_half_precision_logits_are_sampled() -> None:
    sampler = BatchSampler([Sampling(1.0, top_p=0.9, seed=s) for s in range(16)])
    chosen = sampler(logits(rows=16).astype(mx.bfloat16), [0] * 16)
    assert chosen.dtype == mx.uint32
    assert mx.max(chosen).item() < VOCABULARY


PENALTIES: list[dict[str, Any]] = [
    {"repetition_penalty": 1.3},
    {"presence_penalty": 0.8},
    {"frequency_penalty": 0.4},
    {"repetition_penalty": 0.7, "presence_penalty": -0.5, "frequency_penalty": 0.9},
    {},
]


@pytest.mark.parametrize("length", [1, 2, 7, WINDOW - 1, WINDOW, WINDOW + 1, 60])
def test_penalties_equal_those_of_mlx_lm(length: int) -> None:
    values = logits(rows=len(PENALTIES), seed=length)
    tokens = mx.random.randint(0, VOCABULARY, (len(PENALTIES), length), key=mx.random.key(length)).tolist()
    expected = []
    for row, penalties in enumerate(PENALTIES):
        one = mx.array(values[row : row + 1])
        for processor in make_logits_processors(**penalties):
            one = processor(mx.array(tokens[row]), one)
        expected.append(one)
    apply = BatchPenalties([Sampling(0.0, **penalties) for penalties in PENALTIES])
    history = [row[:-1][-(WINDOW - 1) :] for row in tokens]
    result = apply(mx.array(values), mx.array([row[-1] for row in tokens]), history)
    assert mx.allclose(result, mx.concatenate(expected), atol=1e-6)


def test_logits_of_rows_without_penalties_are_unchanged() -> None:
    values = logits(rows=2)
    pipeline = LogitsPipeline([Penalties()], [row_of(uid, [1]) for uid in range(2)])
    assert not pipeline
    assert pipeline(values, mx.array([0, 1]), [(), ()])[0] is values
