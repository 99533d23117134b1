"""Several models on one worker: side by side, switched while it runs, by a memory budget."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from shared.jobs.log import EventKind
from shared.jobs.record import Status
from tests.plugins.stack import catalog_stack
from tests.support.admin import Admin
from tests.support.waiting import eventually
from web.access.api_keys import KeyStore

MIB = 2**20
TWO_FIT = 70 * MIB
"""Each of the tiny models takes 25 MiB."""


@pytest.fixture
def catalog(tiny_model_path: Path, tiny_vision_path: Path, tmp_path: Path) -> str:
    """Three: a small one that is there twice, one that sees; and one that `spoil` makes one that cannot be loaded."""
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in tiny_model_path.iterdir():
        if file.name != "model.safetensors":
            (broken / file.name).symlink_to(file)
    shutil.copy(tiny_model_path / "model.safetensors", broken)
    return f"""
default = "one"
[models.one]
path = "{tiny_model_path}"
aliases = ["first"]
[models.two]
path = "{tiny_model_path}"
context = 512
sampling = {{ max_tokens = 7, temperature = 0 }}
[models.eyes]
path = "{tiny_vision_path}"
[models.broken]
path = "{broken}"
"""


def spoil(models: Path) -> None:
    """Cut a model's weights in halves: had they been so before, the catalog would not have it."""
    weights = models / "broken/model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)


@pytest.fixture
def admin(catalog: str) -> Iterator[Callable[..., Admin]]:
    """Makes an operator of a stack with one worker."""
    with ExitStack() as exits:

        def make(**variables: str) -> Admin:
            stack = exits.enter_context(catalog_stack(catalog, **variables))
            stack.start_worker()
            eventually(stack.registry.hosts, "the worker can be asked", 60)
            operator = Admin(stack)
            exits.callback(operator.http.close)
            return operator

        yield make


def test_models_are_loaded_beside_each_other_and_speak_at_once(admin: Callable[..., Admin]) -> None:
    operator = admin(WORKER_MODELS="one, two", MEMORY_LIMIT_BYTES=str(200 * MIB))
    models = operator.models()
    assert {name: model["state"] for name, model in models.items()} == {
        "one": "warm", "two": "warm", "eyes": "cold", "broken": "cold",
    }  # fmt: skip
    assert models["one"]["default"]
    assert models["one"]["aliases"] == ["first"]
    assert (models["two"]["context"], models["eyes"]["kind"]) == (512, "vision")
    assert 20 * MIB < models["one"]["memory_bytes"] < 30 * MIB
    assert models["one"]["load_s"] > 0
    alone = {name: operator.say(name, max_tokens=60).json()["text"] for name in ("one", "two")}
    assert alone["one"] == alone["two"] == operator.say("first", max_tokens=60).json()["text"]
    ids = {
        operator.http.post(
            "/v1/jobs", json={"model": name, "prompt": "hi"}, headers={"Idempotency-Key": "by-any-name"}
        ).json()["id"]
        for name in ("one", "first")
    }
    assert len(ids) == 1
    with ThreadPoolExecutor(16) as pool:
        texts = list(pool.map(lambda i: operator.say(("one", "two")[i % 2], max_tokens=60).json()["text"], range(16)))
    assert set(texts) == {alone["one"]}
    eventually(lambda: operator.models()["one"]["tokens_per_s"] > 0, "its speed of late is told", 10)
    assert operator.say("two").json()["usage"]["completion_tokens"] == 7, "the catalog's default"
    loaded = operator.ask("load", "eyes")
    assert (loaded["state"], loaded["progress"], loaded["unloaded"]) == ("succeeded", 1.0, [])
    assert loaded["memory_after"] > loaded["memory_before"]
    assert operator.models()["eyes"]["state"] == "warm"
    assert operator.say("eyes", max_tokens=4).status_code == 200
    listed = operator.http.get("/v1/models").json()
    assert {model["id"] for model in listed["data"]} == {"one", "two", "eyes", "broken"}
    assert operator.http.get("/v1/models/first").json()["id"] == "one"
    missing = operator.http.get("/v1/models/none")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")


def test_the_least_recently_used_makes_place_and_a_pinned_one_stays(admin: Callable[..., Admin]) -> None:
    operator = admin(WORKER_MODELS="one, two", MEMORY_LIMIT_BYTES=str(TWO_FIT))
    operator.say("one", max_tokens=2)
    loaded = operator.ask("load", "eyes")
    assert (loaded["state"], loaded["unloaded"]) == ("succeeded", ["two"]), str(loaded)
    assert {name for name, model in operator.models().items() if model["state"] == "warm"} == {"one", "eyes"}
    operator.ask("load", "one", pin=True)
    operator.ask("load", "eyes", pin=True)
    refused = operator.ask("load", "two")
    assert (refused["state"], refused["error"]["code"]) == ("failed", "not_enough_memory")
    assert "one" in refused["error"]["message"]
    assert operator.say("one", max_tokens=2).status_code == operator.say("eyes", max_tokens=2).status_code == 200


def test_a_load_that_fails_leaves_what_was_there(admin: Callable[..., Admin], tmp_path: Path) -> None:
    operator = admin(MEMORY_LIMIT_BYTES=str(200 * MIB))
    spoil(tmp_path)
    expected = operator.say("one", max_tokens=20).json()["text"]
    for mode in ("beside", "replace"):
        failed = operator.ask("load", "broken", mode=mode)
        assert (failed["state"], failed["error"]["code"]) == ("failed", "load_failed")
        assert str(operator.stack.home) not in failed["error"]["message"]
        assert operator.models()["one"]["state"] == "warm"
        assert operator.say("one", max_tokens=20).json()["text"] == expected


def test_what_had_to_go_for_a_load_that_fails_is_put_back(admin: Callable[..., Admin], tmp_path: Path) -> None:
    operator = admin(MEMORY_LIMIT_BYTES=str(36 * MIB))
    spoil(tmp_path)
    failed = operator.ask("load", "broken")
    assert (failed["state"], failed["error"]["code"]) == ("failed", "load_failed")
    eventually(lambda: operator.models()["one"]["state"] == "warm", "it is put back", 30)
    assert operator.say("one", max_tokens=2).status_code == 200


def test_a_model_is_replaced_while_a_stream_of_another_goes_on(admin: Callable[..., Admin]) -> None:
    operator = admin(WORKER_MODELS="one, two", MEMORY_LIMIT_BYTES=str(200 * MIB))
    operator.ask("load", "two", pin=True)
    with operator.stack.client() as client:
        job = client.submit({"model": "two", "prompt": "Go on.", "max_tokens": 450, "temperature": 0})
        events = client.events(job.id)
        for event in events:
            if event.kind is EventKind.CHUNK:
                break
        loaded = operator.ask("load", "eyes", mode="replace")
        assert (loaded["state"], loaded["unloaded"]) == ("succeeded", ["one"])
        kinds = [event.kind for event in events]
        assert kinds[-1] is EventKind.DONE
        assert EventKind.RESUMED not in kinds
        assert client.job(job.id).status is Status.SUCCEEDED


def test_jobs_of_a_model_that_is_unloaded_wait_and_go_on_when_it_is_back(admin: Callable[..., Admin]) -> None:
    operator = admin(DRAIN_S="0.2", LOAD_ON_DEMAND="false", MEMORY_LIMIT_BYTES=str(200 * MIB))
    body = {"model": "one", "prompt": "Tell me.", "max_tokens": 1200, "temperature": 0}
    with operator.stack.client() as client:
        undisturbed = client.submit(body).id
        eventually(lambda: client.job(undisturbed).status.terminal, "it ends", 60)
        expected = client.job(undisturbed).text
        job = client.submit(body)
        eventually(lambda: client.job(job.id).status is Status.RUNNING, "it runs", 10)
        unloaded = operator.ask("unload", "one")
        assert unloaded["state"] == "succeeded"
        assert unloaded["memory_after"] < unloaded["memory_before"]
        assert client.job(job.id).status is Status.QUEUED
        assert operator.models()["one"]["state"] == "cold"
        operator.ask("load", "one")
        eventually(lambda: client.job(job.id).status is Status.SUCCEEDED, "it goes on", 60)
        assert client.job(job.id).text == expected


def test_a_model_is_loaded_when_a_job_asks_for_it(admin: Callable[..., Admin]) -> None:
    operator = admin(MEMORY_LIMIT_BYTES=str(TWO_FIT))
    assert operator.models()["two"]["state"] == "cold"
    assert operator.say("two").json()["usage"]["completion_tokens"] == 7
    assert operator.models()["two"]["state"] == "warm"


def test_a_cold_model_is_refused_where_it_is_so_set(admin: Callable[..., Admin]) -> None:
    operator = admin(LOAD_ON_DEMAND="false")
    refused = operator.say("two")
    assert (refused.status_code, refused.json()["code"], refused.json()["field"]) == (409, "model_not_loaded", "model")
    unknown = operator.say("three")
    assert (unknown.status_code, unknown.json()["code"], unknown.json()["field"]) == (422, "model_not_found", "model")
    assert operator.say("one", max_tokens=2).status_code == 200


def test_only_an_admin_switches_and_bad_requests_are_named(admin: Callable[..., Admin]) -> None:
    operator = admin()
    guest = KeyStore(operator.stack.settings.keys_file).create("guest", ["infer"])
    for verb in ("load", "unload"):
        answer = operator.http.post(f"/inference/{verb}_model", json={"model": "two"}, headers={"X-API-Key": guest})
        assert answer.status_code == 403
    assert operator.http.get("/inference/operations", headers={"X-API-Key": guest}).status_code == 403
    for body, status, field in (
        ({"model": "three"}, 404, "model"),
        ({"model": "two", "worker": "nobody"}, 422, "worker"),
        ({"model": "two", "mode": "sideways"}, 422, "mode"),
        ({}, 422, "model"),
    ):
        answer = operator.http.post("/inference/load_model", json=body)
        assert (answer.status_code, answer.json()["field"]) == (status, field), body
    answer = operator.http.post("/inference/unload_model", json={"model": "two"})
    assert (answer.status_code, answer.json()["code"]) == (404, "model_not_loaded")
    assert operator.http.get("/inference/operations/op_none").status_code == 404
    assert operator.http.get("/inference/operations").json()["data"] == []
