"""`scripts/top` against a running API: what it shows, and what it says if the service is not there or refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest

from scripts.client.api import Client
from scripts.client.cluster_state import History, State
from scripts.client.top_view import screen
from scripts.stack.ports import free_port
from shared.settings import ROOT
from tests.plugins.web_stack import MODEL, StubWorker, WebStack
from tests.support.waiting import eventually

StartWorker = Callable[..., StubWorker]


def top(url: str, key: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "ENV_FILE": os.devnull, "MLXQ_API_KEY": key}
    command = [sys.executable, "-m", "scripts.client.top", "--url", url, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_once_shows_workers_queues_and_running_jobs(web: WebStack, start_worker: StartWorker) -> None:
    worker = start_worker(slots=1)
    worker.hold.set()
    running, waiting = (web.submit(max_tokens=5, priority=priority)["id"] for priority in ("normal", "batch"))
    eventually(lambda: web.job(running)["status"] == "running", "one job runs")
    shown = top(web.url, web.key, "--once")
    assert (shown.returncode, shown.stderr) == (0, "")
    lines = [line.split() for line in shown.stdout.splitlines()]
    [of_model] = [line for line in lines if line[:6] == [MODEL, "0", "+", "0", "+", "1"]]
    [of_worker] = [line for line in lines if line[:3] == ["w1@stub", MODEL, "ready"]]
    assert of_worker[3] == "1/1" and "1/1" in of_model
    [of_job] = [line for line in lines if line[:1] == [running]]
    assert of_job[1:4] == [web.key.split("_")[1], MODEL, "normal"] and waiting not in shown.stdout
    for job in (running, waiting):
        web.http.post(f"/v1/jobs/{job}/cancel")


def test_rates_are_those_between_two_readings(web: WebStack, start_worker: StartWorker) -> None:
    history = History()
    with Client(web.url, web.key) as client:
        history.add(State.read(client))
        start_worker()
        job = web.submit(max_tokens=3)["id"]
        assert web.job(job, wait=10)["status"] == "succeeded"
        history.add(State.read(client))
    elapsed_s = history.now.read_at - history.states[0].read_at
    assert history.per_second("mlxq_jobs_ended_total", status="succeeded") == pytest.approx(1 / elapsed_s)
    assert history.server_errors() == 0
    assert screen(history, web.url)


@pytest.mark.parametrize("arguments", [(), ("--once",)])
def test_a_wrong_key_is_named(web: WebStack, arguments: tuple[str, ...]) -> None:
    refused = top(web.url, "mlxq_wrong_key", *arguments)
    assert refused.returncode == 1 and refused.stdout == ""
    assert refused.stderr == f"scripts/top: {web.url} refuses: The API key is unknown or revoked.\n"


def test_a_service_that_does_not_answer_is_named() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    missing = top(url, "mlxq_some_key", "--once")
    assert missing.returncode == 1 and missing.stderr.startswith(f"scripts/top: {url}: ")
    assert "Traceback" not in missing.stderr


def test_arguments_out_of_range_are_refused() -> None:
    refused = top("http://127.0.0.1:1", "mlxq_some_key", "--every", "0")
    assert refused.returncode == 2 and "'0' is not a number of seconds from 0.1 to 3600" in refused.stderr
