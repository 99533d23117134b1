"""`/inference/models` and `/v1/models`: models of the catalog, their workers, and faults of the catalog."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import pytest

from shared.models.registry import HostInfo, ModelCard, Registry, WorkerInfo
from tests.plugins.web_stack import WebStack, running_web
from tests.support.small_models import make_folder
from tests.support.waiting import eventually


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebStack]:
    """An API whose catalog has a text model, one with an image encoder that is not supported, and an invalid one."""
    models = tmp_path_factory.mktemp("models")
    configs = {"one": {"model_type": "llama"}, "two": {"model_type": "paligemma", "vision_config": {"depth": 2}}}
    for name, config in configs.items():
        folder = make_folder(models / name, "vision_tower.weight" if "vision_config" in config else "weight")
        (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 2048}))
    (models / "catalog.toml").write_text(
        f"""
default = "two"
[models.one]
path = "{models}/one"
aliases = ["uno", "gpt-4o-mini"]
context = 512
dtype = "float16"
[models.two]
path = "{models}/two"
[models.three]
path = "{models}/three"
"""
    )
    with running_web(MODEL_PATH="", MODELS_FILE=str(models / "catalog.toml")) as stack:
        yield stack


def listed(web: WebStack) -> dict[str, dict[str, Any]]:
    return {model["id"]: model for model in web.http.get("/inference/models").json()["data"]}


def announce(web: WebStack, name: str, state: str, **stats: float) -> None:
    """Announce a worker that has the model `one`, for one second."""
    client = web.client()
    registry = Registry(client)
    if state == "ready":
        registry.announce_model(ModelCard("one", "text", 512))
    now = time.time()
    info = WorkerInfo(
        name, f"{name}@host", "host", os.getpid(), "one", state, 8, 3, now, now, {"model_bytes": 64.0, **stats}, {}
    )
    registry.announce_worker(info, 1.0)
    client.close()


def test_cold_models_are_listed_with_the_properties_of_their_folders(web: WebStack) -> None:
    models = listed(web)
    assert list(models) == ["two", "one"], "the default model comes first"
    one, two = models["one"], models["two"]
    assert {model["state"] for model in models.values()} == {"cold"}
    assert (one["default"], two["default"]) == (False, True)
    assert (one["aliases"], one["kind"], one["context"], one["memory_bytes"]) == (
        ["uno", "gpt-4o-mini"],
        "text",
        512,
        32,
    )
    assert (two["aliases"], two["kind"], two["context"], two["memory_bytes"]) == ([], "text", 2048, 64)
    assert (one["text_only"], two["text_only"]) == (False, True)
    assert (one["workers"], one["load_s"], one["tokens_per_s"], one["waiting"]) == ([], None, 0, 0)


def test_faults_of_the_catalog_are_reported_by_line_to_admins_only(web: WebStack) -> None:
    admin = {"X-API-Key": web.keys.create("operator of models", ["infer", "admin"])}
    (fault,) = web.http.get("/inference/models", headers=admin).json()["faults"]
    assert fault.startswith("catalog.toml:11: [models.three]: there is no model in ")
    guest = {"X-API-Key": web.keys.create("guest of models", ["infer"])}
    response = web.http.get("/inference/models", headers=guest)
    assert (response.status_code, response.json()["faults"], len(response.json()["data"])) == (200, [], 2)
    assert "models/three" not in response.text


def test_a_model_lists_its_workers(web: WebStack) -> None:
    announce(web, "w1", "loading", load_progress=0.25)
    eventually(lambda: listed(web)["one"]["state"] == "loading", "it is loading")
    announce(web, "w1", "ready", load_progress=1.0, load_s=1.5, tokens_per_s=20.04, pinned=1.0)
    announce(web, "w2", "loading", load_progress=0.5)
    eventually(lambda: len(listed(web)["one"]["workers"]) == 2, "both workers are listed")
    one = listed(web)["one"]
    assert (one["state"], one["slots"], one["slots_used"], one["memory_bytes"]) == ("warm", 16, 6, 64)
    assert (one["load_s"], one["tokens_per_s"]) == (1.5, 20.0)
    first, second = one["workers"]
    assert first == {
        "worker": "w1@host", "state": "warm", "slots": 8, "slots_used": 3, "pinned": True, "progress": 1.0,
        "memory_bytes": 64, "load_s": 1.5, "tokens_per_s": 20.0, "batching": None,
        "unused_s": 0.0,
    }  # fmt: skip
    assert (second["state"], second["progress"], second["pinned"]) == ("loading", 0.5, False)
    eventually(lambda: listed(web)["one"]["state"] == "cold", "the workers have expired", within_s=5)


def test_the_list_is_always_up_to_date(web: WebStack) -> None:
    web.submit(model="one", max_tokens=1)
    for state, listed_state in (("loading", "loading"), ("ready", "warm"), ("draining", "draining")) * 3:
        announce(web, "w3", state)
        assert listed(web)["one"]["state"] == listed_state
    assert listed(web)["one"]["waiting"] >= 1
    eventually(lambda: listed(web)["one"]["state"] == "cold", "the worker has expired", within_s=5)


def test_models_in_the_formats_of_openai_and_anthropic(web: WebStack) -> None:
    response = web.http.get("/v1/models").json()
    data = response.pop("data")
    assert response == {"object": "list", "has_more": False, "first_id": "two", "last_id": "one"}
    for model in data:
        assert (model["type"], model["display_name"]) == ("model", model["id"])
        assert (model["object"], model["owned_by"]) == ("model", "mlxq")
        created = datetime.fromisoformat(model["created_at"])
        assert model["created"] == created.timestamp()
        assert time.time() - 3600 < model["created"] <= time.time()  # its folder is new
    assert [model["id"] for model in data] == ["two", "one"]
    for name in ("one", "uno", "gpt-4o-mini"):
        assert web.http.get(f"/v1/models/{name}").json()["id"] == "one"
    missing = web.http.get("/v1/models/three")
    assert missing.status_code == 404
    assert missing.json()["error"] | {"message": ""} == {
        "message": "", "type": "invalid_request_error", "param": "model", "code": "model_not_found",
    }  # fmt: skip


@pytest.mark.parametrize("path", ["/inference/models", "/v1/models", "/v1/models/one"])
def test_models_are_not_listed_without_a_key(web: WebStack, path: str) -> None:
    assert web.http.get(path, headers={"X-API-Key": ""}).status_code == 401


def test_max_tokens_is_limited_to_the_context_of_a_cold_model(web: WebStack) -> None:
    refused = web.http.post("/v1/jobs", json={"model": "uno", "prompt": "hi", "max_tokens": 513})
    assert (refused.status_code, refused.json()["field"]) == (422, "max_tokens")
    assert web.http.post("/v1/jobs", json={"model": "uno", "prompt": "hi", "max_tokens": 512}).json()["model"] == "one"


def test_a_model_that_is_not_in_the_catalog_is_listed_while_jobs_wait_for_it(web: WebStack) -> None:
    client = web.client()
    Registry(client).announce_model(ModelCard("elsewhere", "text", 512))
    assert "elsewhere" not in listed(web)
    body = {"model": "elsewhere", "prompt": "hi"}
    for path in ("/v1/jobs", "/inference"):
        refused = web.http.post(path, json=body)
        assert (refused.status_code, refused.json()["code"]) == (404, "model_not_found")
    Registry(client).mark_servable(["elsewhere"])  # as a process with another catalog does
    eventually(lambda: web.http.post("/v1/jobs", json=body).is_success, "it is known")
    assert listed(web)["elsewhere"]["state"] == "absent"
    client.close()


def test_a_job_for_a_model_that_fits_no_worker_is_refused(web: WebStack) -> None:
    client = web.client()
    host = HostInfo("w4@host", "host", os.getpid(), 0.0, time.time(), (), memory_limit=60, memory_used=0)
    Registry(client).announce_host(host, 5.0)
    refused = web.http.post("/v1/jobs", json={"model": "two", "prompt": "hi"})
    assert (refused.status_code, refused.json()["code"], refused.json()["field"]) == (503, "model_not_loaded", "model")
    assert "No worker has" in refused.json()["detail"]
    assert web.http.post("/v1/jobs", json={"model": "one", "prompt": "hi"}).status_code == 202
    Registry(client).forget_host(host.node)
    client.close()
