"""Adapters in the whole stack: HTTP, admission, queue, worker, engine, and a killed worker."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

pytest.importorskip("mlx_lm")

from shared.jobs.log import EventKind
from shared.jobs.record import Status
from tests.plugins.stack import Stack, made_stack
from tests.support.adapters import write_adapter
from tests.support.waiting import eventually

BODY = {"prompt": "Once upon a time", "raw": True, "max_tokens": 60, "temperature": 0}


@pytest.fixture(scope="module")
def stack(tiny_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    home = tmp_path_factory.mktemp("adapters")
    for number, name in enumerate(("sql", "mail", "deleted", "damaged")):
        write_adapter(tiny_model_path, home / "all" / name, seed=number)
    (home / "all/broken").mkdir()
    (home / "all/broken/adapter_config.json").write_text('{"fine_tune_type": "dora"}')
    catalog = home / "catalog.toml"
    catalog.write_text(
        f'[models.chat]\npath = "{tiny_model_path}"\naliases = ["small"]\nadapters_folder = "{home / "all"}"\n'
    )
    for stack in made_stack(tiny_model_path, {"LEASE_S": "1", "MODELS_FILE": str(catalog)}):
        stack.start_web()
        stack.start_background()
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
            ("chat", None), *((f"chat:{name}", "chat") for name in ("damaged", "deleted", "mail", "sql")),
        ]  # fmt: skip
        assert client.request("GET", "/v1/models/small:sql").json()["id"] == "chat:sql"
        (model,) = client.request("GET", "/inference/models").json()["data"]
    assert {each["name"]: each["problem"] for each in model["adapters"]} == {
        "broken": "it is a DoRA; only LoRA is supported", **dict.fromkeys(("damaged", "deleted", "mail", "sql")),
    }  # fmt: skip


def test_responses_and_messages_name_adapters(stack: Stack) -> None:
    turn = [{"role": "user", "content": "Once upon a time"}]
    fields = {"temperature": 0, "max_tokens": 30}
    with stack.client() as client:

        def ask(path: str, **body: Any) -> Any:
            return client.request("POST", path, json={**fields, **body}, wait_s=60).json()

        texts = {}
        for name in ("chat", "chat:sql"):
            texts[name] = ask("/v1/chat/completions", model=name, messages=turn)["choices"][0]["message"]["content"]
        assert texts["chat"] != texts["chat:sql"]
        del fields["max_tokens"]
        for naming in ({"model": "chat:sql"}, {"model": "chat", "adapter": "sql"}):
            response = ask("/v1/responses", input=turn, max_output_tokens=30, **naming)
            assert response["output"][0]["content"][0]["text"] == texts["chat:sql"]
            message = ask("/v1/messages", messages=turn, max_tokens=30, **naming)
            assert message["content"][0]["text"] == texts["chat:sql"]


def test_lines_of_a_batch_name_adapters(stack: Stack) -> None:
    completion = {"prompt": BODY["prompt"], "max_tokens": 30, "temperature": 0}
    naming = [{"model": "chat"}, {"model": "chat:sql"}, {"model": "chat", "adapter": "mail"}, {"model": "chat:nobody"}]
    lines = [
        {"custom_id": str(n), "method": "POST", "url": "/v1/completions", "body": {**completion, **each}}
        for n, each in enumerate(naming)
    ]
    content = "\n".join(json.dumps(line) for line in lines).encode()
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key=stack.key, max_retries=0) as client:
        file = client.files.create(file=("in.jsonl", content), purpose="batch")
        batch = client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
        eventually(lambda: client.batches.retrieve(batch.id).status == "completed", "the batch ends", 60)
        batch = client.batches.retrieve(batch.id)
        answered = [json.loads(line) for line in client.files.content(batch.output_file_id or "").text.splitlines()]
        (refused,) = client.files.content(batch.error_file_id or "").text.splitlines()
        bodies = {each["custom_id"]: each["response"]["body"] for each in answered}
        assert {number: bodies[number]["model"] for number in bodies} == {
            "0": "chat", "1": "chat:sql", "2": "chat:mail",
        }  # fmt: skip
        for body in bodies.values():
            direct = client.completions.create(**completion, model=body["model"])  # type: ignore[call-overload]
            assert body["choices"][0]["text"] == direct.choices[0].text
    error = json.loads(refused)
    assert (error["custom_id"], error["response"]["body"]["error"]["param"]) == ("3", "model")


def test_adapters_that_are_lost_while_the_worker_runs_fail_only_their_jobs(stack: Stack) -> None:
    folders = {name: stack.settings.models_file.parent / "all" / name for name in ("deleted", "damaged")}
    shutil.rmtree(folders["deleted"])
    weights = folders["damaged"] / "adapters.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with stack.client() as client:
        jobs = {name: client.submit({**BODY, "adapter": name}) for name in (None, "sql", *folders)}
        ended = {name: client.job(job.id, wait_s=60) for name, job in jobs.items()}
    reasons = {"deleted": "its files cannot be read: No such file", "damaged": "damaged/adapters.safetensors has "}
    for name, reason in reasons.items():
        assert ended[name].status is Status.FAILED
        error = ended[name].error or {}
        assert error["code"] == "adapter_error"
        assert error["message"].startswith(f"adapter: {name} cannot be used with chat: {reason}")
    assert [ended[name].status for name in (None, "sql")] == [Status.SUCCEEDED] * 2


def test_an_adapter_that_cannot_be_used_is_refused_before_a_job_exists(stack: Stack) -> None:
    unknown = answered(stack, "/v1/jobs", adapter="nobody")
    assert (unknown["status"], unknown["code"], unknown["field"]) == (422, "adapter_not_found", "adapter")
    assert "Its adapters are damaged, deleted, mail, sql." in unknown["detail"]
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
