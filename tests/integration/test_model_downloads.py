"""Downloading a model from a hub over the API, with a real worker, and editing aliases."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.plugins.stack import Stack, catalog_stack
from tests.support.admin import Admin
from tests.support.model_hub import ModelHub, model_hub
from tests.support.waiting import eventually

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def hub(tiny_model_path: Path) -> Iterator[ModelHub]:
    with model_hub(tiny_model_path) as hub:
        yield hub


@pytest.fixture(scope="module")
def stack(hub: ModelHub, tiny_model_path: Path) -> Iterator[Stack]:
    catalog = f'default = "one"\n[models.one]\npath = "{tiny_model_path}"\naliases = ["first"]\n'
    with catalog_stack(catalog, HF_ENDPOINT=hub.url, HF_TOKEN="hf_secret", HF_HUB_DISABLE_XET="1") as stack:
        stack.start_worker()
        eventually(stack.registry.hosts, "the worker is announced", 60)
        yield stack


@pytest.fixture(scope="module")
def operator(stack: Stack) -> Iterator[Admin]:
    operator = Admin(stack)
    yield operator
    operator.http.close()


@pytest.fixture(autouse=True)
def _well_behaved_hub(hub: ModelHub) -> Iterator[None]:
    yield
    hub.stalls.clear()
    hub.info_status, hub.info_error = 200, ""


def download(operator: Admin, **body: Any) -> str:
    response = operator.http.post("/v1/models/downloads", json={"hub": "org/model", **body})
    assert response.status_code == 202, response.text
    return str(response.headers["Location"])


def test_a_download_can_be_cancelled_continued_and_the_model_be_served(
    hub: ModelHub, stack: Stack, operator: Admin, tiny_model_path: Path
) -> None:
    size, part = (tiny_model_path / WEIGHTS).stat().st_size, 5 * 2**20
    hub.stalls[WEIGHTS] = part
    url = download(operator)
    eventually(lambda: (operator.look(url)["bytes_done"] or 0) > part, "some of the weights were received", 30)
    running = operator.look(url)
    assert (running["kind"], running["model"], running["source"]) == ("download", "model", "org/model")
    assert running["state"] == "downloading" and 0 < running["progress"] < 1
    assert size < running["bytes_total"]
    assert download(operator) == url, "the same download is under way"
    waiting = download(operator, name="later")
    other = operator.http.post("/v1/models/downloads", json={"hub": "other/model"})
    assert (other.status_code, other.json()["code"]) == (409, "name_taken")

    for each in (waiting, url):
        answer = operator.http.post(f"/v1/models/downloads/{each.rpartition('/')[2]}/cancel")
        assert answer.status_code == 202, answer.text
    assert operator.end(url)["state"] == operator.end(waiting)["state"] == "cancelled"
    assert "model" not in operator.models()

    hub.stalls.clear()
    assert operator.end(download(operator))["state"] == "succeeded"
    assert hub.of(WEIGHTS)[-1].first >= part, "the second download continues the first one"
    assert hub.of(WEIGHTS)[-1].authorization == "Bearer hf_secret"
    eventually(lambda: operator.models().get("model"), "the catalog has the model", 10)
    assert operator.models()["model"]["state"] == "cold"
    answer = operator.say("model", max_tokens=4)
    assert (answer.status_code, answer.json()["usage"]["completion_tokens"]) == (200, 4), "it is loaded on demand"

    listed = operator.http.get("/v1/models/downloads").json()["data"]
    assert [each["state"] for each in listed] == ["succeeded", "cancelled", "cancelled"]
    assert operator.http.post(f"/v1/models/downloads/{listed[0]['id']}/cancel").json()["state"] == "succeeded"
    assert (stack.home / "model/mlxq.json").is_file()
    loaded = operator.http.delete("/v1/models/model")
    assert (loaded.status_code, loaded.json()["error"]["code"]) == (409, "model_loaded")
    assert operator.ask("unload", "model")["state"] == "succeeded"
    assert operator.http.delete("/v1/models/model").json() == {"id": "model", "object": "model", "deleted": True}
    assert "model" not in operator.models()
    assert operator.http.delete("/v1/models/one").status_code == 404, "it is in the file"
    with_model = operator.http.post("/v1/models/downloads", json={"hub": "other/one"})
    assert (with_model.status_code, with_model.json()["field"]) == (409, "name")


def test_a_refusal_of_the_hub_is_shown_without_paths(hub: ModelHub, stack: Stack, operator: Admin) -> None:
    hub.info_status, hub.info_error = 403, "GatedRepo"
    ended = operator.end(download(operator, name="gated"))
    assert (ended["state"], ended["error"]["code"]) == ("failed", "download_failed")
    assert "org/model is gated" in ended["error"]["message"]
    (stack.home / "mine").mkdir()
    (stack.home / "mine/config.json").write_text("{}")
    hub.info_status, hub.info_error = 200, ""
    ended = operator.end(download(operator, name="mine"))
    assert ended["error"]["message"].startswith("mine exists and was not fetched from org/model")
    assert not {"gated", "mine"} & set(operator.models())


def test_aliases_can_be_added_and_removed(operator: Admin) -> None:
    def put(model: str, *aliases: str) -> Any:
        return operator.http.put(f"/v1/models/{model}/aliases", json={"aliases": list(aliases)})

    changed = put("one", "small", "first")
    assert (changed.status_code, changed.json()["aliases"]) == (200, ["first", "small"]), changed.text
    assert operator.say("small", max_tokens=2).json()["model"] == "one"
    assert operator.http.get("/v1/models/small").json()["id"] == "one"
    assert put("none", "x").status_code == 404
    for taken in ("one", "small"):
        refused = put("one" if taken == "one" else "model", taken)
        assert refused.status_code in (404, 409), refused.text
    assert put("one", "not/valid").status_code == 422
    assert put("one").json()["aliases"] == ["first"]
    assert operator.say("small", max_tokens=2).status_code == 404


def test_downloads_and_aliases_need_the_scope_admin_and_valid_fields(stack: Stack, operator: Admin) -> None:
    requests: list[tuple[str, str, dict[str, Any]]] = [
        ("POST", "/v1/models/downloads", {"hub": "org/model"}),
        ("POST", "/v1/models/downloads/op_1/cancel", {}),
        ("PUT", "/v1/models/one/aliases", {"aliases": []}),
        ("DELETE", "/v1/models/one", {}),
    ]
    key = operator.http.post("/v1/keys", json={"name": "user", "scopes": ["infer"]}).json()["key"]
    for method, path, body in requests:
        answer = operator.http.request(method, path, json=body, headers={"X-API-Key": key})
        assert answer.status_code == 403, path
    assert operator.http.post("/v1/models/downloads/op_1/cancel").status_code == 404
    for body in ({"hub": "model"}, {"hub": "a/b", "name": "../x"}, {"hub": "a/b", "revision": "--force"}, {}):
        answer = operator.http.post("/v1/models/downloads", json=body)
        assert answer.status_code == 422, body
    unknown = operator.http.post("/v1/models/downloads", json={"hub": "a/b", "worker": "nobody"})
    assert (unknown.status_code, unknown.json()["code"]) == (422, "worker_not_found")
