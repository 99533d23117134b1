"""Metrics: labels of workers, and the completeness of help texts and docs/metrics.md."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from shared.models.registry import Registry, WorkerInfo
from shared.redis.client import Redis
from shared.settings import ROOT
from web.metrics import WORKER_HELP, ClusterCollector

PAGE = (ROOT / "docs/metrics.md").read_text()
REPORTING = {"stats", "_read_gauges", "_describe"}
"""Functions of the worker that return its numbers in a dictionary."""


def reported(path: Path) -> Iterator[str]:
    for function in ast.walk(ast.parse(path.read_text())):
        if isinstance(function, ast.FunctionDef) and function.name in REPORTING:
            for node in ast.walk(function):
                if isinstance(node, ast.Dict):
                    yield from (key.value for key in node.keys if isinstance(key, ast.Constant))  # type: ignore[misc]


def test_help_texts_exist_for_exactly_the_numbers_that_workers_report() -> None:
    names = {name for path in (ROOT / "worker").rglob("*.py") for name in reported(path)}
    assert names | {"slots", "slots_used"} == set(WORKER_HELP)


def test_the_page_has_the_help_texts_of_worker_metrics() -> None:
    listed = dict(re.findall(r"^\| `mlxq_worker_(\w+)` \| (.+) \|$", PAGE, re.MULTILINE))
    assert listed == WORKER_HELP


def test_the_page_lists_exactly_the_metrics_of_the_api() -> None:
    source = "".join((ROOT / path).read_text() for path in ("web/metrics.py", "web/background/metrics.py"))
    defined = {(kind.startswith("Counter"), name) for kind, name in re.findall(r'(\w+)\(\s*"(mlxq_\w+)"', source)}
    listed = set(re.findall(r"^\| `(mlxq_\w+)`", PAGE, re.MULTILINE))
    of_api = {name for name in listed if not name.startswith("mlxq_worker_")}
    assert of_api == {name + "_total" * counter for counter, name in defined}


def test_a_restarted_worker_continues_its_time_series(client: Redis) -> None:
    registry = Registry(client)

    def announce(number: int, model: str, tokens: float) -> None:
        card = WorkerInfo(
            f"w@h/{number}", "w@h", "h", number, model, "ready", 4, 0, 0.0, 0.0, {"tokens_per_s": tokens}, {}
        )
        registry.announce_worker(card, 60)

    announce(2, "a", 1.0)  # the predecessor, which has died; its card has not expired yet
    announce(1, "a", 2.0)
    announce(3, "b", 3.0)
    [family] = [each for each in ClusterCollector(client).collect() if each.name == "mlxq_worker_tokens_per_s"]
    assert [(sample.labels, sample.value) for sample in family.samples] == [
        ({"worker": "w@h", "model": "a"}, 2.0),
        ({"worker": "w@h", "model": "b"}, 3.0),
    ]
