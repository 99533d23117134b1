"""A real Prometheus scrapes a stack, and every panel of the dashboard and every alert can be evaluated."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml

from scripts.stack.ports import free_port
from shared.settings import ROOT
from tests.plugins.stack import Stack, made_stack
from tests.support.waiting import eventually

FOLDER = ROOT / "deploy/observability"
DASHBOARD = json.loads((FOLDER / "grafana/dashboards/mlxq.json").read_text())
EMPTY = {"Attempts that did not end their job A"}
"""Expressions without a value: no attempt is lost here."""

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        shutil.which("prometheus") is None, reason="prometheus is not installed: apt-get install prometheus"
    ),
]


@contextmanager
def prometheus(folder: Path, stack: Stack) -> Iterator[httpx2.Client]:
    """Run Prometheus with the configuration of deploy/observability, for a stack."""
    config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["scrape_configs"][0]["static_configs"] = [{"targets": [stack.url.removeprefix("http://")]}]
    config["scrape_configs"][0]["authorization"]["credentials_file"] = "mlxq.key"  # in the folder of prometheus.yml
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    (folder / "mlxq.key").write_text(stack.key)
    shutil.copy(FOLDER / "alerts.yml", folder)
    url = f"http://127.0.0.1:{free_port()}"
    command = [
        "prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data",
        f"--web.listen-address={url.removeprefix('http://')}",
    ]  # fmt: skip
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        with httpx2.Client(base_url=url, timeout=30) as client:
            eventually(lambda: answers(client), "Prometheus answers")
            yield client
    finally:
        process.terminate()
        process.wait(30)


def answers(client: httpx2.Client) -> bool:
    try:
        return client.get("/-/ready").is_success
    except httpx2.TransportError:
        return False


def query(client: httpx2.Client, expression: str) -> list[Any]:
    response = client.get("/api/v1/query", params={"query": expression})
    assert response.status_code == 200, response.text
    result: list[Any] = response.json()["data"]["result"]
    return result


def test_every_panel_has_values_and_no_alert_fires(tiny_model_path: Path, tmp_path: Path) -> None:
    for stack in made_stack(tiny_model_path, {"SLOTS": "4"}):
        stack.start_web()
        stack.start_worker()
        stack.start_background()
        with prometheus(tmp_path, stack) as client, stack.client() as api:
            eventually(lambda: query(client, "mlxq_workers"), "the first scrape")
            for number in range(12):
                api.submit({"prompt": f"Tell me a story {number}.", "max_tokens": 20}, wait_s=30)
            eventually(lambda: query(client, "rate(mlxq_worker_output_tokens_total[1m]) > 0"), "tokens are counted")
            eventually(lambda: query(client, "rate(mlxq_key_tokens_total[1m]) > 0"), "keys are counted")
            empty = {
                f"{panel['title']} {target['refId']}"
                for panel in DASHBOARD["panels"]
                for target in panel.get("targets", [])
                if not query(client, target["expr"].replace("$__rate_interval", "1m").replace("$model", ".*"))
            }
            rules = client.get("/api/v1/rules").json()["data"]["groups"][0]["rules"]
            assert empty == EMPTY
            assert {rule["health"] for rule in rules} == {"ok"}
            assert {rule["name"] for rule in rules if rule["state"] == "firing"} == set()
