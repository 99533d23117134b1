"""Several models on one worker: running together, loaded and unloaded within a memory budget."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from shared.jobs.log import EventKind
from shared.jobs.record import Status
from shared.redis import keys
from tests.plugins.stack import catalog_stack
from tests.support.admin import Admin
from tests.support.waiting import eventually
from web.access.api_keys import KeyStore

MIB = 2**20
TWO_FIT = 70 * MIB
"""Enough for two models: each of the tiny models has 25 MiB."""


@pytest.fixture
def catalog(tiny_model_path: Path, tiny_vision_path: Path, tmp_path: Path) -> str:
    """A catalog of a text model under two names, a vision model, and a model that `corrupt` makes unloadable."""
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


def corrupt(models: Path) -> None:
    """Truncate the weights of the model `broken`. If they were truncated earlier, the catalog would refuse it."""
    weights = models / "broken/model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)


@pytest.fixture
def admin(catalog: str) -> Iterator[Callable[..., Admin]]:
    """Starts a stack with one worker and returns a client for its admin routes."""
    with ExitStack() as exits:

        def make(**variables: str) -> Admin:
            stack = exits.enter_context(catalog_stack(catalog, **variables))
            stack.start_worker()
            eventually(stack.registry.hosts, "the worker is announced", 60)
            operator = Admin(stack)
            exits.callback(operator.http.close)
            return operator

        yield make


def test_several_models_run_on_one_worker(admin: Callable[..., Admin]) -> None:
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
    expected = {name: operator.say(name, max_tokens=60).json()["text"] for name in ("one", "two")}
    assert expected["one"] == expected["two"] == operator.say("first", max_tokens=60).json()["text"]
    ids = {
        operator.http.post(
            "/v1/jobs", json={"model": name, "prompt": "hi"}, headers={"Idempotency-Key": "by-any-name"}
        ).json()["id"]
        for name in ("one", "first")
    }
    assert len(ids) == 1
    with ThreadPoolExecutor(16) as pool:
        texts = list(pool.map(lambda i: operator.say(("one", "two")[i % 2], max_tokens=60).json()["text"], range(16)))
    assert set(texts) == {expected["one"]}
    eventually(lambda: operator.models()["one"]["tokens_per_s"] > 0, "its speed is reported", 10)
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


def test_the_least_recently_used_model_is_unloaded_unless_it_is_pinned(admin: Callable[..., Admin]) -> None:
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


def test_a_failed_load_keeps_the_loaded_models(admin: Callable[..., Admin], tmp_path: Path) -> None:
    operator = admin(MEMORY_LIMIT_BYTES=str(200 * MIB))
    corrupt(tmp_path)
    expected = operator.say("one", max_tokens=20).json()["text"]
    for mode in ("beside", "replace"):
        failed = operator.ask("load", "broken", mode=mode)
        assert (failed["state"], failed["error"]["code"]) == ("failed", "load_failed")
        assert str(operator.stack.home) not in failed["error"]["message"]
        assert operator.models()["one"]["state"] == "warm"
        assert operator.say("one", max_tokens=20).json()["text"] == expected
    for _ in range(2):  # a job that waits while the model is tried, and one that is refused afterwards
        refused = operator.say("broken")
        assert (refused.status_code, refused.json()["code"]) == (422, "load_failed"), refused.text
        assert "broken does not load" in refused.json()["detail"]
        assert str(operator.stack.home) not in refused.text


def unknown_architecture(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    replace_file(folder / "config.json", json.dumps(config | {"model_type": "nonesuch"}))


def other_shape(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    replace_file(folder / "config.json", json.dumps(config | {"hidden_size": 2 * config["hidden_size"]}))


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def truncated(folder: Path) -> None:
    corrupt(folder.parent)


def replace_file(path: Path, text: str) -> None:
    """Replace a file, which may be a link to one that other tests use."""
    path.unlink()
    path.write_text(text)


def test_every_kind_of_broken_model_ends_its_jobs(admin: Callable[..., Admin], tmp_path: Path) -> None:
    """The folder breaks in another way each time, so the model is tried again each time, and only once."""
    operator, folder = admin(MEMORY_LIMIT_BYTES=str(200 * MIB)), tmp_path / "broken"
    body = {"model": "broken", "prompt": "hello", "stream": True}
    kinds = (truncated, unknown_architecture, other_shape, no_tokenizer)
    for tried, break_model in enumerate(kinds, 1):
        break_model(folder)
        operator.stack.redis.delete(keys.DEMAND + "broken")  # the time between two tries is over
        streamed = operator.http.post("/inference", json=body, headers={"Accept": "application/x-ndjson"})
        error = json.loads(streamed.text.splitlines()[-1])["data"]["error"]
        assert error["code"] == "load_failed" and "broken does not load: " in error["message"]
        refused = operator.http.post("/v1/jobs", json={"model": "broken", "prompt": "hello"})
        assert (refused.status_code, refused.json()["code"]) == (422, "load_failed")
        assert refused.json()["detail"] == error["message"]
        assert len(operator.http.get("/inference/operations").json()["data"]) == tried
    assert operator.say("one", max_tokens=2).status_code == 200


def test_models_unloaded_for_a_failed_load_are_loaded_again(admin: Callable[..., Admin], tmp_path: Path) -> None:
    operator = admin(MEMORY_LIMIT_BYTES=str(36 * MIB))
    corrupt(tmp_path)
    failed = operator.ask("load", "broken")
    assert (failed["state"], failed["error"]["code"]) == ("failed", "load_failed")
    eventually(lambda: operator.models()["one"]["state"] == "warm", "it is loaded again", 30)
    assert operator.say("one", max_tokens=2).status_code == 200


def test_replacing_a_model_does_not_interrupt_a_stream_of_another(admin: Callable[..., Admin]) -> None:
    operator = admin(WORKER_MODELS="one, two", MEMORY_LIMIT_BYTES=str(200 * MIB), LEASE_S="5")
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


def test_jobs_of_an_unloaded_model_wait_and_continue_when_it_is_loaded_again(admin: Callable[..., Admin]) -> None:
    operator = admin(DRAIN_S="0.2", LOAD_ON_DEMAND="false", MEMORY_LIMIT_BYTES=str(200 * MIB))
    body = {"model": "one", "prompt": "Tell me.", "max_tokens": 1200, "temperature": 0}
    with operator.stack.client() as client:
        uninterrupted = client.submit(body).id
        eventually(lambda: client.job(uninterrupted).status.terminal, "it ends", 60)
        expected = client.job(uninterrupted).text
        job = client.submit(body)
        eventually(lambda: client.job(job.id).status is Status.RUNNING, "it runs", 10)
        unloaded = operator.ask("unload", "one")
        assert unloaded["state"] == "succeeded"
        assert unloaded["memory_after"] < unloaded["memory_before"]
        assert client.job(job.id).status is Status.QUEUED
        assert operator.models()["one"]["state"] == "cold"
        operator.ask("load", "one")
        eventually(lambda: client.job(job.id).status is Status.SUCCEEDED, "it continues", 60)
        assert client.job(job.id).text == expected


def test_a_model_is_loaded_on_demand(admin: Callable[..., Admin]) -> None:
    operator = admin(MEMORY_LIMIT_BYTES=str(TWO_FIT))
    assert operator.models()["two"]["state"] == "cold"
    assert operator.say("two").json()["usage"]["completion_tokens"] == 7
    assert operator.models()["two"]["state"] == "warm"


def test_jobs_for_a_cold_model_are_refused_without_load_on_demand(admin: Callable[..., Admin]) -> None:
    operator = admin(LOAD_ON_DEMAND="false")
    refused = operator.say("two")
    assert (refused.status_code, refused.json()["code"], refused.json()["field"]) == (409, "model_not_loaded", "model")
    unknown = operator.say("three")
    assert (unknown.status_code, unknown.json()["code"], unknown.json()["field"]) == (404, "model_not_found", "model")
    assert operator.say("one", max_tokens=2).status_code == 200


def test_loading_needs_the_admin_scope_and_valid_fields(admin: Callable[..., Admin]) -> None:
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


def test_an_unused_model_is_unloaded_and_returns_on_demand(admin: Callable[..., Admin]) -> None:
    # On a busy machine, announcements may come late: a long lease keeps the loaded models in the list.
    operator = admin(MODEL_IDLE_S="0.5", MEMORY_LIMIT_BYTES=str(200 * MIB), LEASE_S="10")
    assert operator.say("two").status_code == 200  # loaded on demand
    loaded = operator.ask("load", "eyes", pin=True)
    assert loaded["state"] == "succeeded", loaded["error"]
    eventually(lambda: operator.models()["two"]["state"] == "cold", "it is unloaded")
    states = {name: model["state"] for name, model in operator.models().items()}
    assert (states["one"], states["eyes"]) == ("warm", "warm")  # one from the start, one pinned
    assert operator.say("two").status_code == 200
