"""Several models of a worker and their queues, with fake models that load and generate as their folders say."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from shared.jobs.record import Status
from shared.redis import keys
from tests.plugins.stack import Stack, catalog_stack
from tests.support.admin import Admin
from tests.support.waiting import eventually

MIB = 2**20
SIZE = 20 * MIB
SLOW = "!pause=0.02"
SPARE = 1
"""Spare jobs of a worker with this few slots."""


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Admin]]:
    """Return a function that makes a stack with fake models and without workers.

    Its argument maps the names of models to orders for the fake loader.
    """
    with ExitStack() as exits:

        def make_stack(models: dict[str, str], **variables: str) -> Admin:
            lines = [f'default = "{next(iter(models))}"']
            for name, orders in models.items():
                folder = tmp_path / name
                folder.mkdir()
                (folder / "config.json").write_text(f'{{"orders": "{orders}"}}')
                with (folder / "model.safetensors").open("wb") as weights:
                    weights.truncate(SIZE)
                lines += [f"[models.{name}]", f'path = "{folder}"']
            stack = exits.enter_context(catalog_stack("\n".join(lines), **{"BACKEND": "fake", **variables}))
            operator = Admin(stack)
            exits.callback(operator.http.close)
            return operator

        yield make_stack


def unclaimed(stack: Stack, model: str) -> int:
    """Return the number of jobs in a model's queue that no worker has claimed."""
    return sum(not stack.redis.hget(keys.JOB + job, "worker") for job in stack.redis.zrange(keys.QUEUE + model, 0, -1))


def test_a_full_model_claims_no_jobs_while_another_model_serves_its_own(make: Callable[..., Admin]) -> None:
    operator = make({"one": "", "two": "", "three": ""}, SLOTS="2", WORKER_MODELS="one,two", DRAIN_S="0")
    stack = operator.stack
    stack.start_worker()
    with stack.client() as client:
        full = [client.submit({"model": "one", "prompt": f"{SLOW} {i}", "max_tokens": 4000}) for i in range(7)]
        eventually(lambda: stack.slots_used() == 2, "the first model is full")
        others = [client.submit({"model": "two", "prompt": f"{i}", "max_tokens": 5}) for i in range(9)]
        eventually(lambda: all(client.job(job.id).status is Status.SUCCEEDED for job in others), "the others end")
        eventually(lambda: unclaimed(stack, "one") == 5 - SPARE, "one spare job is claimed")
        for job in full[:2]:
            client.cancel(job.id)
        eventually(lambda: unclaimed(stack, "one") == 3 - SPARE, "the next jobs start")
        for job in full[2:]:
            client.cancel(job.id)
        eventually(lambda: not stack.redis.exists(keys.QUEUE + "one"), "the queue is empty")


def test_a_second_worker_takes_jobs_of_a_model_that_is_full_on_the_first(make: Callable[..., Admin]) -> None:
    operator = make({"one": "", "two": "", "three": ""}, SLOTS="2", WORKER_MODELS="one", DRAIN_S="0")
    stack = operator.stack
    for _ in range(2):
        stack.start_worker()
    with stack.client() as client:
        jobs = [client.submit({"model": "one", "prompt": f"{SLOW} {i}", "max_tokens": 4000}) for i in range(7)]
        eventually(lambda: stack.slots_used() == 4, "both workers are full")
        assert {worker.slots_used for worker in stack.ready_workers()} == {2}
        eventually(lambda: unclaimed(stack, "one") == 3 - 2 * SPARE, "each has claimed a spare job")
        for job in jobs:
            client.cancel(job.id)


def test_a_models_jobs_are_claimed_only_while_it_is_loaded(make: Callable[..., Admin]) -> None:
    operator = make({"one": "", "two": ""}, LOAD_ON_DEMAND="false")
    stack = operator.stack
    stack.start_worker()
    eventually(stack.registry.hosts, "the worker accepts commands")
    for _ in range(2):
        assert operator.ask("load", "two")["state"] == "succeeded"
        assert operator.say("two").status_code == 200
        assert operator.ask("unload", "two")["state"] == "succeeded"
        assert not stack.redis.exists(keys.QUEUE + "two")
        assert {worker.model for worker in stack.registry.workers()} == {"one"}
    assert len(stack.redis.zrange(keys.LEASES, 0, -1)) == 1


def test_operations_of_a_killed_worker_fail(make: Callable[..., Admin]) -> None:
    """The worker restarts at once, under the same name, while a job of another model runs."""
    operator = make({"one": "", "two": "!load=60", "three": ""})
    stack = operator.stack
    worker = stack.start_worker()
    eventually(stack.registry.hosts, "the worker accepts commands")
    first = operator.begin("load", "two")
    second = operator.begin("load", "three")
    eventually(lambda: operator.look(first)["progress"] > 0, "the first begins")
    assert operator.look(first)["state"] == "loading"
    assert operator.look(second)["state"] == "waiting"
    assert operator.models()["two"]["state"] == "loading"
    with stack.client() as client:
        job = client.submit({"model": "one", "prompt": SLOW, "max_tokens": 100})
        eventually(lambda: client.job(job.id).status is Status.RUNNING, "another model generates meanwhile")
        worker.kill()
        worker.wait(10)
        stack.start_worker(MLXQ_WORKER_INDEX="0")
        eventually(lambda: client.job(job.id).status is Status.SUCCEEDED, "its job continues")
        for where in (first, second):
            ended = operator.end(where)
            assert (ended["state"], ended["error"]["code"]) in (("failed", "worker_lost"), ("failed", "worker_silent"))
        assert operator.ask("load", "three")["state"] == "succeeded"


def failing(operator: Admin, way: str) -> tuple[str, str]:
    """Ask in one way for text of the model that is broken for it; return the error's code and message."""
    body = {"model": f"broken-{way}", "prompt": "hello"}
    if way == "inference":
        problem = operator.http.post("/inference", json=body)
        assert problem.status_code == 422 and "Retry-After" not in problem.headers
        return problem.json()["code"], problem.json()["detail"]
    if way == "batch":
        folder = operator.stack.home
        (folder / "prompts.jsonl").write_text(json.dumps({"prompt": "hello"}) + "\n")
        arguments = [str(folder / "prompts.jsonl"), "-o", str(folder / "out.jsonl"), "--model", body["model"]]
        command = [sys.executable, "-m", "scripts.client.batch", *arguments, "--url", operator.stack.url]
        subprocess.run(command, env={**operator.stack.env, "MLXQ_API_KEY": operator.stack.key}, timeout=60, check=False)
        (result,) = map(json.loads, (folder / "out.jsonl").read_text().splitlines())
        return result["error"]["code"], result["error"]["message"]
    answer = operator.http.post("/inference" if way == "stream" else "/v1/jobs", json=body | STREAM.get(way, {}))
    if answer.status_code == 422:
        return answer.json()["code"], answer.json()["detail"]
    if way == "stream":
        done = json.loads(answer.text.strip().splitlines()[-1])["data"]
        return done["error"]["code"], done["error"]["message"]
    with operator.stack.client() as client:
        eventually(lambda: client.job(answer.json()["id"]).status is Status.FAILED, "the job fails", 30)
    error = operator.http.get(f"/v1/jobs/{answer.json()['id']}").json()["error"]
    return error["code"], error["message"]


STREAM = {"stream": {"stream": True}}


def test_requests_for_a_model_that_does_not_load_end_with_the_reason(make: Callable[..., Admin]) -> None:
    """The first one waits while the model is tried, the second one is refused at once."""
    ways = ("job", "inference", "stream", "batch")
    operator = make({"one": "", **{f"broken-{way}": "!load=0.1 !load-fails=1" for way in ways}})
    operator.http.headers["Accept"] = "application/x-ndjson, application/json"
    operator.stack.start_worker()
    eventually(operator.stack.registry.hosts, "the worker accepts commands")
    for way in ways:
        for _ in range(2):
            code, message = failing(operator, way)
            assert code == "load_failed" and message.startswith(f"broken-{way} does not load: ")
    operations = operator.http.get("/inference/operations").json()["data"]
    assert len(operations) == len(ways), "a model is not tried for each request"
    assert operator.say("one").status_code == 200


def test_a_model_is_tried_again_when_its_folder_has_changed(make: Callable[..., Admin], tmp_path: Path) -> None:
    operator = make({"one": "", "broken": "!load=0.1 !load-fails=1"})
    stack = operator.stack
    stack.start_worker()
    eventually(stack.registry.hosts, "the worker accepts commands")
    key = {"Idempotency-Key": "mine"}
    accepted = operator.http.post("/v1/jobs", json={"model": "broken", "prompt": "hello"}, headers=key)
    with stack.client() as client:
        eventually(lambda: client.job(accepted.json()["id"]).status is Status.FAILED, "the job fails", 30)
    again = operator.http.post("/v1/jobs", json={"model": "broken", "prompt": "hello"}, headers=key)
    assert again.json()["id"] == accepted.json()["id"], "an accepted job is not refused when it is sent again"
    (tmp_path / "broken/config.json").write_text("{}")
    stack.redis.delete(keys.DEMAND + "broken")  # the time between two tries is over
    assert operator.say("broken").status_code == 200


def test_many_jobs_for_a_cold_model_load_it_once(make: Callable[..., Admin]) -> None:
    operator = make({"one": "", "two": "!load=1"}, WEB_WORKERS="2")
    stack = operator.stack
    stack.start_worker()
    eventually(stack.registry.hosts, "the worker accepts commands")
    with stack.client() as client:
        jobs = [client.submit({"model": "two", "prompt": f"{i}", "max_tokens": 3}) for i in range(20)]
        eventually(lambda: all(client.job(job.id).status is Status.SUCCEEDED for job in jobs), "all end")
    assert len(operator.http.get("/inference/operations").json()["data"]) == 1


def test_models_that_do_not_fit_into_memory_are_not_loaded_at_the_start(make: Callable[..., Admin]) -> None:
    operator = make(
        {"one": "", "two": "", "three": ""}, WORKER_MODELS="one,two,three", MEMORY_LIMIT_BYTES=f"{2.5 * SIZE:.0f}"
    )
    stack = operator.stack
    stack.start_worker()
    eventually(stack.registry.hosts, "the worker accepts commands")
    assert {name for name, model in operator.models().items() if model["state"] == "warm"} == {"one", "two"}
    assert "memory" in stack.log("worker-0") and "model_not_loaded" in stack.log("worker-0")
    assert stack.registry.hosts()[0].memory_used == 2 * SIZE


def test_a_worker_that_has_ended_gets_no_commands(make: Callable[..., Admin]) -> None:
    operator = make({"one": "", "two": ""}, LEASE_S="30")
    worker = operator.stack.start_worker()
    eventually(operator.stack.registry.hosts, "the worker accepts commands")
    assert operator.stack.stop(worker) == 0
    refused = operator.http.post("/inference/load_model", json={"model": "two"})
    assert (refused.status_code, refused.json()["code"]) == (503, "no_worker")


def test_a_job_that_kills_its_worker_fails_no_job_of_another_model(make: Callable[..., Admin]) -> None:
    operator = make({"one": "", "two": ""}, WORKER_MODELS="one,two", DRAIN_S="0")
    stack = operator.stack
    worker = stack.start_worker()
    with stack.client() as client:
        others = [client.submit({"model": "two", "prompt": f"{SLOW} {i}", "max_tokens": 250}) for i in range(3)]
        eventually(lambda: all(client.job(job.id).status is Status.RUNNING for job in others), "they run")
        bad = client.submit({"model": "one", "prompt": "!encode=1 !die=3", "max_tokens": 100})
        for _ in range(3):
            assert worker.wait(30) == 9
            worker = stack.start_worker(MLXQ_WORKER_INDEX="0")
        eventually(lambda: client.job(bad.id).status.terminal, "it ends")
        assert client.job(bad.id).status is Status.FAILED
        eventually(lambda: all(client.job(job.id).status.terminal for job in others), "the others end", 60)
        assert {client.job(job.id).status for job in others} == {Status.SUCCEEDED}


@pytest.mark.parametrize("on_demand", [True, False])
def test_a_service_without_models_is_ready_if_jobs_load_their_model(
    make: Callable[..., Admin], on_demand: bool
) -> None:
    operator = make({"one": "", "two": ""}, LOAD_ON_DEMAND=str(on_demand).lower())
    operator.stack.start_worker()
    eventually(operator.stack.registry.hosts, "the worker accepts commands")
    assert operator.ask("unload", "one")["state"] == "succeeded"
    expected = (200, "degraded", ["No model is loaded. The first job will load its model."])
    if not on_demand:
        expected = (503, "down", ["No worker is ready."])

    def state() -> tuple[int, str, list[str]]:
        health = operator.http.get("/health")
        return health.status_code, health.json()["status"], health.json()["reasons"]

    eventually(lambda: state() == expected, "the worker has announced that it has no model")
    assert operator.http.get("/readyz").status_code == (200 if on_demand else 503)
    if on_demand:
        assert operator.say("one").status_code == 200
        assert operator.http.get("/readyz").status_code == 200
