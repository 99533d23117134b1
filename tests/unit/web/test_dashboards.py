"""The dashboard and the alert rules in deploy/observability use only metrics and labels that the API exports."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import prometheus_client.parser as prometheus
import pytest
import yaml

from shared.histogram import Histogram
from shared.models.registry import ModelCard, Registry, WorkerInfo
from shared.redis import keys
from shared.settings import ROOT, Settings
from tests.support.fake_redis import FakeRedis
from web.app import create_app
from web.metrics.workers import FORMER_NAMES, HISTOGRAMS, WORKER_METRICS

FOLDER = ROOT / "deploy/observability"
DASHBOARD = json.loads((FOLDER / "grafana/dashboards/mlxq.json").read_text())
RULES = [rule for group in yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"] for rule in group["rules"]]
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
EXPRESSIONS = {
    **{rule["alert"]: rule["expr"] for rule in RULES},
    **{f"{panel['title']} {each['refId']}": each["expr"] for panel in PANELS for each in panel["targets"]},
}
_METRIC = re.compile(r"\b((?:mlxq|gen_ai_server|flask)_\w+?)\b(?=[\s{\[)]|$)(?:\{(.*?)\})?")
_GROUPING = re.compile(r"\b(?:by|without) \(([^)]*)\)")
needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed: apt-get install prometheus"
)


def worker() -> WorkerInfo:
    """A worker that reports everything that workers can report."""
    histograms = tuple(Histogram(name, (1.0,), "normal" * each.by_priority) for name, each in HISTOGRAMS.items())
    card = WorkerInfo("w@h/1", "w@h", "h", 1, "m", "ready", 4, 1, 0.0, 0.0, dict.fromkeys(WORKER_METRICS, 1.0), {})
    return replace(card, histograms=histograms)


@pytest.fixture(scope="module")
def page() -> str:
    client = FakeRedis()
    registry = Registry(client)
    registry.announce_model(ModelCard("m", "text", 64))
    registry.announce_worker(worker(), 60)
    client.hset(keys.ENDED, "m:failed", 1)
    client.hset(keys.ATTEMPTS, "m:worker_lost", 1)
    client.hset(keys.ROUTED, "m:preferred", 1)
    client.hset(keys.TOKENS, "key:input", 1)
    app = create_app(Settings(metrics_public=True), client)
    app.extensions["mlxq"].metrics.submitted.labels("m", "normal").inc()
    web = app.test_client()
    web.get("/livez")
    return web.get("/metrics").text


@pytest.fixture(scope="module")
def exported(page: str) -> dict[str, set[str]]:
    """The labels of each name on the page."""
    labels: defaultdict[str, set[str]] = defaultdict(set)
    for family in prometheus.text_string_to_metric_families(page):
        for sample in family.samples:
            labels[sample.name] |= sample.labels.keys()
    return labels


def used_labels(expression: str) -> Iterator[str]:
    for match in _METRIC.finditer(expression):
        yield from re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", match[2] or "")
    for group in _GROUPING.finditer(expression):
        yield from re.findall(r"\w+", group[1])


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_metrics_and_labels_of_an_expression_exist(name: str, exported: dict[str, set[str]]) -> None:
    names = {match[1] for match in _METRIC.finditer(EXPRESSIONS[name])}
    assert names <= exported.keys()
    added = {"instance", "job"}  # by Prometheus
    known = added.union(*(exported[each] for each in names))
    assert set(used_labels(EXPRESSIONS[name])) <= known
    assert names or "up{" in EXPRESSIONS[name]


def test_the_check_finds_unknown_names_and_labels(exported: dict[str, set[str]]) -> None:
    expression = 'sum by (colour) (rate(mlxq_jobs_wating{model="a"}[5m])) + mlxq_redis_up'
    assert {match[1] for match in _METRIC.finditer(expression)} - exported.keys() == {"mlxq_jobs_wating"}
    assert set(used_labels(expression)) == {"colour", "model"}


def test_every_alert_has_a_severity_and_says_what_is_wrong() -> None:
    for rule in RULES:
        assert rule["labels"]["severity"] in {"warning", "critical"}
        assert rule["annotations"]["summary"].endswith(".")
    page = (ROOT / "docs/observability.md").read_text()
    assert re.findall(r"^\| `(Mlxq\w+)` \|", page, re.MULTILINE) == [rule["alert"] for rule in RULES]


def test_panels_do_not_overlap_and_explain_themselves() -> None:
    cells = set()
    for panel in PANELS:
        place = panel["gridPos"]
        mine = {(place["x"] + i, place["y"] + j) for i in range(place["w"]) for j in range(place["h"])}
        assert not mine & cells and place["x"] + place["w"] <= 24
        cells |= mine
        assert panel["description"].endswith(".")
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


def promtool(*arguments: str | Path, page: str = "") -> str:
    done = subprocess.run(["promtool", *arguments], input=page, capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else done.stdout + done.stderr


@needs_promtool
def test_promtool_accepts_the_configuration_and_the_rules() -> None:
    assert promtool("check", "config", "--syntax-only", FOLDER / "prometheus.yml") == ""
    assert promtool("check", "rules", FOLDER / "alerts.yml") == ""


@needs_promtool
def test_alerts_fire_when_they_should() -> None:
    assert promtool("test", "rules", FOLDER / "alerts_test.yml") == ""


@needs_promtool
def test_promtool_accepts_the_page(page: str) -> None:
    other_names = "|".join(("flask_", *FORMER_NAMES))  # the library's names, and those that will be removed
    own = re.sub(rf"^(# \w+ )?({other_names}).*\n", "", page, flags=re.MULTILINE)
    assert promtool("check", "metrics", page=own) == ""


@needs_promtool
def test_promtool_can_parse_every_expression(tmp_path: Path) -> None:
    expressions = [each.replace("$__rate_interval", "5m") for each in EXPRESSIONS.values()]
    rules = [{"record": f"x:{number}", "expr": each} for number, each in enumerate(expressions)]
    (tmp_path / "rules.yml").write_text(json.dumps({"groups": [{"name": "g", "rules": rules}]}))
    assert promtool("check", "rules", tmp_path / "rules.yml") == ""
