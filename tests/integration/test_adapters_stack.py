"""Adapters in the whole stack: HTTP, admission, queue, worker, engine, and a killed worker."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mlx_lm")

from shared.jobs.log import EventKind
from shared.jobs.record import Status
from tests.plugins.stack import Stack, made_stack
from tests.support.adapters import write_adapter

BODY = {"prompt": "Once upon a time", "raw": True, "max_tokens": 60, "temperature": 0}


@pytest.fixture(scope="module")
def stack(tiny_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    home = tmp_path_factory.mktemp("adapters")
    for number, name in enumerate(("sql", "mail")):
        write_adapter(tiny_model_path, home / "all" / name, seed=number)
    (home / "all/broken").mkdir()
    (home / "all/broken/adapter_config.json").write_text('{"fine_tune_type": "dora"}')
    catalog = home / "catalog.toml"
    catalog.write_text(
        f'[models.chat]\npath = "{tiny_model_path}"\naliases = ["small"]\nadapters_folder = "{home / "all"}"\n'
    )
    for stack in made_stack(tiny_model_path, {"LEASE_S": "1", "MODELS_FILE": str(catalog)}):
        stack.start_web()
        stack.start_worker()
        yield stack


def answered(stack: Stack, path: str, **fields: Any) -> dict[str, Any]:
    with stack.client() as client:
        answer: dict[str, Any] = client.request("POST", path, json={**BODY, **fields}, wait_s=60, also=(422,)).json()
    return answer


def test_every_api_names_adapters_in_the_same_ways(stack: Stack) -> None:
    plain, sql, mail = (answered(stack, "/inference", adapter=name) for name in (None, "sql", "mail"))
    assert len({plain["text"], sql["text"], mail["text"]}) == 3
    assert [each["adapter"] for each in (plain, sql, mail)] == [None, "sql", "mail"]
    assert answered(stack, "/inference", model="small:sql")["text"] == sql["text"]

    completion = {"model": "chat:mail", "prompt": BODY["prompt"], "max_tokens": 60, "temperature": 0}
    with stack.client() as client:
        answer = client.request("POST", "/v1/completions", json=completion, wait_s=60).json()
        assert (answer["model"], answer["choices"][0]["text"]) == ("chat:mail", mail["text"])
        models = client.request("GET", "/v1/models").json()["data"]
        assert [(each["id"], each["parent"]) for each in models] == [
            ("chat", None), ("chat:mail", "chat"), ("chat:sql", "chat"),
        ]  # fmt: skip
        assert client.request("GET", "/v1/models/small:sql").json()["id"] == "chat:sql"
        (model,) = client.request("GET", "/inference/models").json()["data"]
    assert {each["name"]: each["problem"] for each in model["adapters"]} == {
        "broken": "it is a DoRA; only LoRA is supported", "mail": None, "sql": None,
    }  # fmt: skip


def test_an_adapter_that_cannot_be_used_is_refused_before_a_job_exists(stack: Stack) -> None:
    unknown = answered(stack, "/v1/jobs", adapter="nobody")
    assert (unknown["status"], unknown["code"], unknown["field"]) == (422, "adapter_not_found", "adapter")
    assert "Its adapters are mail, sql." in unknown["detail"]
    broken = answered(stack, "/v1/jobs", adapter="broken")
    assert (broken["code"], broken["field"]) == ("adapter_error", "adapter")
    body = {"model": "chat:nobody", "prompt": "Hi"}
    with stack.client() as client:
        answer = client.request("POST", "/v1/completions", json=body, also=(400,))
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "model")


def test_a_job_continues_with_its_adapter_after_its_worker_was_killed(stack: Stack) -> None:
    request = {**BODY, "adapter": "sql", "max_tokens": 150}
    with stack.client() as client:
        whole = client.submit(request, wait_s=60)
        job, texts, kinds = client.submit(request), [], []
        for event in client.events(job.id):
            kinds.append(event.kind)
            if event.kind is EventKind.CHUNK:
                texts.append(json.loads(event.data)["text"])
                if len(texts) == 3:
                    stack.stop(stack.processes[-1], signal.SIGKILL)
                    stack.start_worker()
        finished = client.job(job.id)
    assert EventKind.RESUMED in kinds
    assert (whole.status, finished.status) == (Status.SUCCEEDED, Status.SUCCEEDED)
    assert "".join(texts) == finished.text == whole.text
