"""`/inference/models` and `/v1/models`: what the catalog has, what workers tell, and who may see what is wrong."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from typing import Any

import pytest

from shared.models.registry import HostInfo, ModelCard, Registry, WorkerInfo
from tests.plugins.web_stack import WebStack, running_web
from tests.support.small_models import make_folder
from tests.support.waiting import eventually


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebStack]:
    """An API with a catalog of two, and a third that is wrong."""
    models = tmp_path_factory.mktemp("models")
    for name in ("one", "two"):
        config = {"model_type": "llama", "max_position_embeddings": 2048}
        (make_folder(models / name) / "config.json").write_text(json.dumps(config))
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


def tell(web: WebStack, name: str, state: str, **stats: float) -> None:
    """What a worker that has `one` says of itself, for a moment."""
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


def test_models_that_nobody_has_are_cold_and_told_with_what_their_folders_say(web: WebStack) -> None:
    models = listed(web)
    assert list(models) == ["two", "one"], "the default first"
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
    assert (one["workers"], one["load_s"], one["tokens_per_s"], one["waiting"]) == ([], None, 0, 0)


def test_what_is_wrong_is_told_by_line_to_who_may_mend_it(web: WebStack) -> None:
    (fault,) = web.http.get("/inference/models").json()["faults"]
    assert fault.startswith("catalog.toml:11: [models.three]: there is no model in ")
    guest = {"X-API-Key": web.keys.create("guest of models", ["infer"])}
    answer = web.http.get("/inference/models", headers=guest)
    assert (answer.status_code, answer.json()["faults"], len(answer.json()["data"])) == (200, [], 2)
    assert "models/three" not in answer.text


def test_workers_tell_their_part_of_a_model(web: WebStack) -> None:
    tell(web, "w1", "loading", load_progress=0.25)
    eventually(lambda: listed(web)["one"]["state"] == "loading", "it is being loaded")
    tell(web, "w1", "ready", load_progress=1.0, load_s=1.5, tokens_per_s=20.04, pinned=1.0)
    tell(web, "w2", "loading", load_progress=0.5)
    eventually(lambda: len(listed(web)["one"]["workers"]) == 2, "both are there")
    one = listed(web)["one"]
    assert (one["state"], one["slots"], one["slots_used"], one["memory_bytes"]) == ("warm", 16, 6, 64)
    assert (one["load_s"], one["tokens_per_s"]) == (1.5, 20.0)
    first, second = one["workers"]
    assert first == {
        "worker": "w1@host", "state": "warm", "slots": 8, "slots_used": 3, "pinned": True, "progress": 1.0,
        "memory_bytes": 64, "load_s": 1.5, "tokens_per_s": 20.0,
    }  # fmt: skip
    assert (second["state"], second["progress"], second["pinned"]) == ("loading", 0.5, False)
    eventually(lambda: listed(web)["one"]["state"] == "cold", "they are forgotten", within_s=5)


def test_a_model_is_listed_as_it_is_now(web: WebStack) -> None:
    web.submit(model="one", max_tokens=1)
    for state, told in (("loading", "loading"), ("ready", "warm"), ("draining", "draining")) * 3:
        tell(web, "w3", state)
        assert listed(web)["one"]["state"] == told
    assert listed(web)["one"]["waiting"] >= 1
    eventually(lambda: listed(web)["one"]["state"] == "cold", "it is forgotten", within_s=5)


def test_the_same_in_openais_form(web: WebStack) -> None:
    answer = web.http.get("/v1/models").json()
    assert set(answer) == {"object", "data"} and answer["object"] == "list"
    for model in answer["data"]:
        assert (model["object"], model["owned_by"]) == ("model", "mlxq") and isinstance(model["created"], int)
    assert [model["id"] for model in answer["data"]] == ["two", "one"]
    for name in ("one", "uno", "gpt-4o-mini"):
        assert web.http.get(f"/v1/models/{name}").json()["id"] == "one"
    missing = web.http.get("/v1/models/three")
    assert missing.status_code == 404
    assert missing.json()["error"] | {"message": ""} == {
        "message": "", "type": "invalid_request_error", "param": "model", "code": "model_not_found",
    }  # fmt: skip


@pytest.mark.parametrize("path", ["/inference/models", "/v1/models", "/v1/models/one"])
def test_nobody_without_a_key_sees_them(web: WebStack, path: str) -> None:
    assert web.http.get(path, headers={"X-API-Key": ""}).status_code == 401


def test_a_request_is_held_to_the_context_of_a_model_that_is_cold(web: WebStack) -> None:
    refused = web.http.post("/v1/jobs", json={"model": "uno", "prompt": "hi", "max_tokens": 513})
    assert (refused.status_code, refused.json()["field"]) == (422, "max_tokens")
    assert web.http.post("/v1/jobs", json={"model": "uno", "prompt": "hi", "max_tokens": 512}).json()["model"] == "one"


def test_a_model_that_no_catalog_has_is_listed_while_somebody_waits_for_it(web: WebStack) -> None:
    client = web.client()
    Registry(client).announce_model(ModelCard("elsewhere", "text", 512))
    assert "elsewhere" not in listed(web)
    eventually(lambda: web.http.post("/v1/jobs", json={"model": "elsewhere", "prompt": "hi"}).is_success, "it is known")
    assert listed(web)["elsewhere"]["state"] == "absent"
    client.close()


def test_a_model_that_fits_no_worker_is_refused_at_once(web: WebStack) -> None:
    client = web.client()
    host = HostInfo("w4@host", "host", os.getpid(), 0.0, time.time(), (), memory_limit=60, memory_used=0)
    Registry(client).announce_host(host, 5.0)
    refused = web.http.post("/v1/jobs", json={"model": "two", "prompt": "hi"})
    assert (refused.status_code, refused.json()["code"], refused.json()["field"]) == (503, "model_not_loaded", "model")
    assert "no worker has" in refused.json()["detail"]
    assert web.http.post("/v1/jobs", json={"model": "one", "prompt": "hi"}).status_code == 202
    Registry(client).forget_host(host.node)
    client.close()
