"""Metrics: names, help texts, and that docs/metrics.md lists exactly what is exported."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import prometheus_client.openmetrics.parser as openmetrics
import pytest

from shared.histogram import Histogram, quantile
from shared.jobs.record import Priority
from shared.jobs.request import Request, Sampling
from shared.jobs.store import Jobs, Submission
from shared.models.registry import ModelCard, Registry, WorkerInfo
from shared.redis import keys
from shared.redis.client import Redis
from shared.settings import ROOT, Settings
from web.app import create_app
from web.metrics.cluster import KEYS_SHOWN, OTHER_KEYS, ClusterCollector
from web.metrics.workers import FORMER_NAMES, HISTOGRAMS, PREFIX, WORKER_METRICS
from worker.engine.meters import BOUNDS

PAGE = (ROOT / "docs/metrics.md").read_text()
REPORTING = {"stats", "_read_gauges", "_describe"}
"""Functions of the worker that return its numbers in a dictionary."""
WORKER = WorkerInfo("w@h/1", "w@h", "h", 1, "a", "ready", 4, 1, 0.0, 0.0, {}, {})
MODEL = "a"
_DEFINITION = r'\b((?:Counter|Gauge|Histogram)(?:MetricFamily)?)\(\s*"(mlxq_\w+)"'


def reported(path: Path) -> Iterator[str]:
    for function in ast.walk(ast.parse(path.read_text())):
        if isinstance(function, ast.FunctionDef) and function.name in REPORTING:
            for node in ast.walk(function):
                if isinstance(node, ast.Dict):
                    yield from (key.value for key in node.keys if isinstance(key, ast.Constant))  # type: ignore[misc]


def families(client: Redis) -> dict[str, dict[tuple[str, ...], float]]:
    """Return the values of the cluster's metrics by name and labels."""
    found = {}
    for family in ClusterCollector(client).collect():
        found[family.name] = {tuple(sample.labels.values()): sample.value for sample in family.samples}
    return found


def announce(client: Redis, worker: WorkerInfo) -> None:
    registry = Registry(client)
    registry.announce_model(ModelCard(worker.model, "text", 64))
    registry.announce_worker(worker, 60)


def test_help_texts_exist_for_exactly_the_numbers_that_workers_report() -> None:
    names = {name for path in (ROOT / "worker").rglob("*.py") for name in reported(path)}
    assert names | {"slots", "slots_used"} == set(WORKER_METRICS)


def test_help_texts_exist_for_exactly_the_histograms_that_workers_report() -> None:
    assert {*BOUNDS, "redis_write"} == set(HISTOGRAMS)


def test_the_page_has_the_help_texts_of_worker_metrics() -> None:
    listed = dict(re.findall(r"^\| `mlxq_worker_(\w+)` \| (.+) \|$", PAGE, re.MULTILINE))
    assert listed == {metric.name: metric.help for metric in WORKER_METRICS.values()}
    histograms = re.findall(r"^\| `(\w+_seconds)` \| (yes|no) \| (.+) \|$", PAGE, re.MULTILINE)
    assert histograms == [(name, "yes" if split else "no", text) for name, text, split in HISTOGRAMS.values()]
    assert all(f"`{name}`" in PAGE for name in FORMER_NAMES)


def test_the_page_lists_exactly_the_metrics_of_the_api() -> None:
    source = "".join(path.read_text() for path in sorted((ROOT / "web/metrics").glob("*.py")))
    defined = {("Counter" in kind, name) for kind, name in re.findall(_DEFINITION, source)}
    listed = {
        name for line in re.findall(r"^\| `mlxq_.*?` \|", PAGE, re.MULTILINE) for name in re.findall(r"mlxq_\w+", line)
    }
    of_api = {name for name in listed if not name.startswith(PREFIX)} - {name for name, *_ in HISTOGRAMS.values()}
    assert of_api == {name + "_total" * counter for counter, name in defined}


def test_a_restarted_worker_continues_its_time_series(client: Redis) -> None:
    for number, model, tokens in (
        (2, "a", 1.0),  # the predecessor, which has died; its card has not expired yet
        (1, "a", 2.0),
        (3, "b", 3.0),
    ):
        announce(client, replace(WORKER, id=f"w@h/{number}", model=model, stats={"tokens_per_s": tokens}))
    expected = {("w@h", "a"): 2.0, ("w@h", "b"): 3.0}
    found = families(client)
    assert found["mlxq_worker_output_tokens_per_second"] == expected
    assert found["mlxq_worker_tokens_per_s"] == expected  # the former name


def test_a_histogram_travels_from_the_worker_to_the_page(client: Redis) -> None:
    histogram = Histogram("time_to_first_token", (0.1, 1.0), "high")
    for seconds in (0.1, 0.5, 0.5, 7.0):
        histogram.observe(seconds)
    announce(client, replace(WORKER, histograms=(histogram,)))
    [family] = [each for each in ClusterCollector(client).collect() if each.name.startswith("gen_ai_")]
    labels = {
        "worker": "w@h",
        "gen_ai_operation_name": "generate_content",
        "gen_ai_provider_name": "mlxq",
        "gen_ai_request_model": "a",
        "priority": "high",
    }
    buckets = {sample.labels["le"]: sample.value for sample in family.samples if sample.name.endswith("_bucket")}
    assert buckets == {"0.1": 1, "1.0": 3, "+Inf": 4}
    assert [s.value for s in family.samples if s.name.endswith("_sum") and s.labels == labels] == [pytest.approx(8.1)]
    Registry(client).announce_model(ModelCard("a", "embedding", 64))
    [family] = [each for each in ClusterCollector(client).collect() if each.name.startswith("gen_ai_")]
    assert {sample.labels["gen_ai_operation_name"] for sample in family.samples} == {"embeddings"}


def test_a_histogram_that_this_version_cannot_read_hides_nothing(client: Redis) -> None:
    known = Histogram("prefill", (1.0,))
    for unreadable in ({"name": "prefill"}, {**asdict(known), "counts": [1]}, 3, {**asdict(known), "name": "new"}):
        card = json.loads(WORKER.to_json()) | {"started_at": 0.0, "heartbeat_at": 0.0}
        read = WorkerInfo.from_json(json.dumps(card | {"histograms": [unreadable, asdict(known)]}))
        assert known in read.histograms


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0.0), (0.5, 0.1), (0.75, 0.55), (1.0, 1.0)])
def test_quantiles_are_interpolated(share: float, expected: float) -> None:
    assert quantile(share, (0.1, 1.0), (2, 2, 0)) == pytest.approx(expected)


def test_quantiles_without_observations_or_above_all_bounds() -> None:
    assert quantile(0.5, (0.1, 1.0), (0, 0, 0)) is None
    assert quantile(0.5, (0.1, 1.0), (0, 0, 5)) == 1.0


def test_depth_and_age_are_counted_by_class(client: Redis) -> None:
    announce(client, WORKER)
    jobs = Jobs(client, Settings(durable=False))
    for priority, age_s in ((Priority.HIGH, 5), (Priority.BATCH, 100), (Priority.BATCH, 50)):
        job = jobs.create(Submission(Request(MODEL, 1, Sampling(0.0), prompt="x"), "o", priority=priority)).job
        client.hset(keys.JOB + job.id, "created_at", job.created_at - age_s)
    found = families(client)
    waiting, ages = found["mlxq_jobs_waiting"], found["mlxq_oldest_job_age_seconds"]
    assert waiting == {("a", "high"): 1, ("a", "normal"): 0, ("a", "batch"): 2}
    assert 5 <= ages["a", "high"] < 50 and ages["a", "normal"] == 0 and 100 <= ages["a", "batch"] < 1000


def test_a_key_keeps_its_series_and_all_others_share_one_that_never_falls(client: Redis) -> None:
    many = range(1, KEYS_SHOWN + 3)
    client.hset(keys.TOKENS, mapping={f"key{n}:output": n for n in many})
    found = families(client)
    assert len(found["mlxq_key_tokens"]) == KEYS_SHOWN + 1
    assert found["mlxq_key_tokens"][OTHER_KEYS, "output"] == 1 + 2, "the keys with fewest tokens"
    assert found["mlxq_tokens"] == {("input",): 0.0, ("output",): sum(many)}
    client.hset(keys.TOKENS, "key1:output", 10_000)
    assert families(client)["mlxq_key_tokens"] == {
        **found["mlxq_key_tokens"], (OTHER_KEYS, "output"): 10_000 + 2,
    }  # fmt: skip


def test_both_formats_of_the_page_can_be_parsed(client: Redis) -> None:
    worker = replace(WORKER, stats={"steps": 1.0, "claims_total": 2.0}, histograms=(Histogram("prefill", (1.0,)),))
    announce(client, worker)
    web = create_app(Settings(metrics_public=True), client).test_client()
    page = web.get("/metrics", headers={"Accept": "application/openmetrics-text"}).text
    names = [family.name for family in openmetrics.text_string_to_metric_families(page)]
    assert len(names) == len(set(names)) and "mlxq_worker_engine_steps" in names
