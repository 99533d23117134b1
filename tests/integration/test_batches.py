"""`/v1/batches` with the official client: the API, background processes and a stub worker over real sockets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types import Batch
from openai.types.responses import Response

from shared.redis import keys
from shared.settings import ROOT
from tests.plugins.web_stack import StubWorker, WebStack, running_web
from tests.support.waiting import eventually

CHAT = "/v1/chat/completions"
WITHIN_S = 60.0


@pytest.fixture(scope="module")
def web() -> Iterator[WebStack]:
    with running_web(BATCH_LOOKAHEAD="16", MAX_BODY_BYTES="100000") as stack:
        stack.start_background()
        yield stack


@pytest.fixture
def sdk(web: WebStack) -> Iterator[openai.OpenAI]:
    """A client with a key of its own."""
    key = web.keys.create(f"test-{os.urandom(4).hex()}", {"infer"})
    with openai.OpenAI(base_url=f"{web.url}/v1", api_key=key, max_retries=0) as client:
        eventually(lambda: client.files.list().data == [], "the API knows the new key")
        yield client


def request_line(custom_id: str, url: str = CHAT, **body: Any) -> dict[str, Any]:
    prompt = {"messages": [{"role": "user", "content": custom_id}]} if url == CHAT else {"prompt": custom_id}
    body = {"model": "stub", **prompt, "max_tokens": 3, **body}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def jsonl(lines: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def create(sdk: openai.OpenAI, content: bytes, endpoint: Any = CHAT, **options: Any) -> Batch:
    file = sdk.files.create(file=("in.jsonl", content), purpose="batch")
    options = {"completion_window": "24h", **options}
    return sdk.batches.create(input_file_id=file.id, endpoint=endpoint, **options)


def ended(sdk: openai.OpenAI, batch: Batch, within_s: float = WITHIN_S) -> Batch:
    """Wait for a batch to end."""

    def state() -> Batch | None:
        latest = sdk.batches.retrieve(batch.id)
        return latest if latest.status in ("failed", "completed", "expired", "cancelled") else None

    return eventually(state, f"{batch.id} ends", within_s) or batch


def results(sdk: openai.OpenAI, file_id: str | None) -> list[dict[str, Any]]:
    return [json.loads(line) for line in sdk.files.content(file_id).text.splitlines()] if file_id else []


def test_a_batch_runs_all_its_requests(
    web: WebStack, sdk: openai.OpenAI, start_worker: Callable[..., StubWorker]
) -> None:
    start_worker()
    lines = [request_line(f"line {n}", max_tokens=1 + n % 3) for n in range(60)]
    lines[7]["body"]["temperature"] = 9
    batch = create(sdk, jsonl(lines), metadata={"night": "7"})
    assert (batch.object, batch.status, batch.endpoint) == ("batch", "validating", CHAT)
    assert batch.expires_at == batch.created_at + 24 * 3600
    done = ended(sdk, batch)
    assert done.status == "completed", web.log.read_text()
    assert done.request_counts is not None and done.usage is not None
    assert done.request_counts.to_dict() == {"total": 60, "completed": 59, "failed": 1}
    assert (done.model, done.metadata, done.errors) == ("stub", {"night": "7"}, None)
    assert done.completed_at is not None and done.in_progress_at is not None
    answers = {each["custom_id"]: each for each in results(sdk, done.output_file_id)}
    assert set(answers) == {line["custom_id"] for line in lines} - {"line 7"}
    assert done.usage.output_tokens == sum(1 + n % 3 for n in range(60) if n != 7)
    for line in lines:
        if line["custom_id"] in answers:
            response = answers[line["custom_id"]]["response"]
            words = line["body"]["max_tokens"]
            assert response["status_code"] == 200
            assert response["body"]["usage"]["completion_tokens"] == words
            assert response["body"]["choices"][0]["message"]["content"].startswith("w0")
    (refused,) = results(sdk, done.error_file_id)
    assert (refused["custom_id"], refused["response"]["status_code"]) == ("line 7", 400)
    assert refused["response"]["body"]["error"]["param"] == "temperature"
    assert not [*(web.home / "files/batches").iterdir()], "the folder of an ended batch is deleted"
    assert sdk.get("/jobs", cast_to=object)["data"] == [], "the jobs of a batch are deleted"  # type: ignore[index]


def test_completions_are_an_endpoint_too(sdk: openai.OpenAI, start_worker: Callable[..., StubWorker]) -> None:
    start_worker()
    lines = [request_line(str(n), "/v1/completions") for n in range(3)]
    done = ended(sdk, create(sdk, jsonl(lines), "/v1/completions"))
    texts = [each["response"]["body"]["choices"][0]["text"] for each in results(sdk, done.output_file_id)]
    assert len(texts) == 3 and all(text.startswith("w0") for text in texts)


def test_responses_are_an_endpoint_too(sdk: openai.OpenAI, start_worker: Callable[..., StubWorker]) -> None:
    start_worker()
    bodies: list[dict[str, Any]] = [{"input": "hi"}, {"input": "hi", "background": True}, {"input": [{"type": "x"}]}]
    lines = [
        {"custom_id": str(n), "method": "POST", "url": "/v1/responses", "body": {"max_output_tokens": 3, **body}}
        for n, body in enumerate(bodies)
    ]
    done = ended(sdk, create(sdk, jsonl(lines), "/v1/responses"))
    (answer,) = results(sdk, done.output_file_id)
    response = Response.model_validate(answer["response"]["body"])
    assert response.output_text.startswith("w0") and response.usage is not None and response.usage.output_tokens == 3
    errors = [each["response"]["body"]["error"]["param"] for each in results(sdk, done.error_file_id)]
    assert errors == ["background", "input[0]"]


def test_batches_are_listed_and_belong_to_their_key(web: WebStack, sdk: openai.OpenAI) -> None:
    ids = [create(sdk, jsonl([request_line("a")])).id for _ in range(5)]
    assert [batch.id for batch in sdk.batches.list(limit=2)] == ids[::-1]
    other = sdk.with_options(api_key=web.key)
    for call in (other.batches.retrieve, other.batches.cancel):
        with pytest.raises(openai.NotFoundError):
            call(ids[0])
    file = sdk.files.create(file=("in.jsonl", jsonl([request_line("a")])), purpose="batch")
    with pytest.raises(openai.NotFoundError):
        other.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
    for batch_id in ids:
        sdk.batches.cancel(batch_id)
    for batch_id in ids:
        eventually(lambda batch_id=batch_id: sdk.batches.retrieve(batch_id).status == "cancelled", "cancelled")


def bad(**change: Any) -> dict[str, Any]:
    return {**request_line("b"), **change}


@pytest.mark.parametrize(
    ("content", "errors"),
    [
        (b"", [("empty_file", None, None)]),
        (b"\n \n", [("empty_file", None, None)]),
        (jsonl([request_line("a")]) + b"not json\n", [("invalid_json_line", 2, None)]),
        (b"[1]\n", [("invalid_json_line", 1, None)]),
        (b'{"custom_id": "\xff"}\n', [("invalid_json_line", 1, None)]),
        (b'{"a": 1, "a": 2}\n', [("invalid_json_line", 1, "a")]),
        (jsonl([bad(url="/v1/embeddings")]), [("mismatched_endpoint", 1, "url")]),
        (jsonl([bad(method="GET")]), [("invalid_method", 1, "method")]),
        (jsonl([bad(custom_id=7)]), [("invalid_custom_id", 1, "custom_id")]),
        (jsonl([bad(body="x")]), [("invalid_body", 1, "body")]),
        (jsonl([bad(colour="red")]), [("unknown_parameter", 1, "colour")]),
        (jsonl([request_line("a"), request_line("b"), request_line("a")]), [("duplicate_custom_id", 3, "custom_id")]),
        (jsonl([bad(method="GET"), request_line("a"), bad(url="x")]), [("invalid_method", 1, "method"),
                                                                      ("mismatched_endpoint", 3, "url")]),
        (jsonl([request_line("x" * 100_000), request_line("a")]), [("line_too_large", 1, None)]),
    ],
    ids=range(14),
)  # fmt: skip
def test_a_file_with_invalid_lines_fails_as_a_whole(
    web: WebStack, sdk: openai.OpenAI, content: bytes, errors: list[tuple[str, int | None, str | None]]
) -> None:
    done = ended(sdk, create(sdk, content))
    assert done.status == "failed" and done.failed_at is not None
    assert done.errors is not None and done.errors.data is not None
    assert [(error.code, error.line, error.param) for error in done.errors.data] == errors
    assert (done.output_file_id, done.error_file_id) == (None, None)
    assert sdk.get("/jobs", cast_to=object)["data"] == []  # type: ignore[index]


def test_a_file_with_too_many_lines_fails(web: WebStack, sdk: openai.OpenAI) -> None:
    line = json.dumps({**request_line("%d"), "body": {}}).encode() + b"\n"
    content = b"".join(line.replace(b"%d", str(n).encode()) for n in range(50_001))
    done = ended(sdk, create(sdk, content))
    assert done.errors is not None and done.errors.data is not None
    assert [(error.code, error.line) for error in done.errors.data] == [("too_many_requests", 50_001)]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"endpoint": "/v1/images/generations"}, "endpoint"),
        ({"completion_window": "soon"}, "completion_window"),
        ({"completion_window": "99d"}, "completion_window"),
        ({"metadata": {"a": "x" * 513}}, "metadata.a"),
        ({"input_file_id": ""}, "input_file_id"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_an_invalid_request_is_refused_by_name(web: WebStack, change: dict[str, Any], param: str) -> None:
    body = {"input_file_id": "file-1", "endpoint": CHAT, "completion_window": "24h", **change}
    response = web.http.post("/v1/batches", json=body)
    assert response.status_code in (400, 422)
    assert response.json()["error"]["param"] == param


def test_a_deleted_file_cannot_be_used_but_a_running_batch_continues(
    sdk: openai.OpenAI, start_worker: Callable[..., StubWorker]
) -> None:
    batch = create(sdk, jsonl([request_line("a")]))
    sdk.files.delete(batch.input_file_id)
    with pytest.raises(openai.NotFoundError):
        sdk.batches.create(input_file_id=batch.input_file_id, endpoint=CHAT, completion_window="24h")
    start_worker()
    assert ended(sdk, batch).status == "completed"


def test_an_idempotency_key_creates_one_batch(sdk: openai.OpenAI) -> None:
    file = sdk.files.create(file=("in.jsonl", b"not json\n"), purpose="batch")
    headers = {"Idempotency-Key": "night-7"}
    request: dict[str, Any] = {"input_file_id": file.id, "endpoint": CHAT, "extra_headers": headers}
    first = sdk.batches.create(**request, completion_window="24h")
    assert sdk.batches.create(**request, completion_window="24h").id == first.id
    with pytest.raises(openai.APIStatusError) as refused:
        sdk.batches.create(**request, completion_window="12h")
    assert refused.value.code == "idempotency_key_reused"
    assert len(sdk.batches.list().data) == 1
    ended(sdk, first)


def test_a_cancelled_batch_keeps_the_results_it_has(
    web: WebStack, sdk: openai.OpenAI, start_worker: Callable[..., StubWorker]
) -> None:
    worker = start_worker(slots=4)
    batch = create(sdk, jsonl([request_line(str(n), max_tokens=3 if n < 4 else 4000) for n in range(40)]))

    def completed() -> bool:
        counts = sdk.batches.retrieve(batch.id).request_counts
        return counts is not None and counts.completed == 4

    eventually(completed, "the short requests have ended")
    assert sdk.batches.cancel(batch.id).status == "cancelling"
    assert sdk.batches.cancel(batch.id).status in ("cancelling", "finalizing", "cancelled")
    done = ended(sdk, batch)
    assert done.status == "cancelled" and done.cancelling_at is not None and done.cancelled_at is not None
    assert {each["custom_id"] for each in results(sdk, done.output_file_id)} == {"0", "1", "2", "3"}
    assert {each["error"]["code"] for each in results(sdk, done.error_file_id)} == {"batch_cancelled"}
    eventually(lambda: not web.client().keys(keys.QUEUE + "*"), "no job is left")
    with pytest.raises(openai.ConflictError) as refused:
        sdk.batches.cancel(batch.id)
    assert refused.value.code == "batch_ended"
    assert worker.is_alive()


def test_requests_expire_with_the_completion_window(
    sdk: openai.OpenAI, start_worker: Callable[..., StubWorker]
) -> None:
    start_worker(slots=2)
    lines = [request_line(str(n), max_tokens=2 if n < 2 else 4000) for n in range(30)]
    done = ended(sdk, create(sdk, jsonl(lines), completion_window="3s"))
    assert done.status == "expired" and done.expired_at is not None
    answered = {each["custom_id"] for each in results(sdk, done.output_file_id)}
    missed = results(sdk, done.error_file_id)
    assert {"0", "1"} <= answered
    assert {each["error"]["code"] for each in missed} == {"batch_expired"}
    assert sorted([*answered, *(each["custom_id"] for each in missed)], key=int) == [str(n) for n in range(30)]


def test_the_batch_command_runs_the_same_file(
    web: WebStack, start_worker: Callable[..., StubWorker], tmp_path: Path
) -> None:
    worker = start_worker()
    lines = [request_line("chat"), request_line("text", "/v1/completions"), request_line("bad", temperature=9)]
    (tmp_path / "in.jsonl").write_bytes(jsonl(lines))
    command = [sys.executable, "-m", "scripts.client.batch", "in.jsonl", "-o", "out.jsonl", "--url", web.url]
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "ENV_FILE": os.devnull, "MLXQ_API_KEY": web.key}
    for _ in range(2):  # the second run sends nothing again
        run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert run.returncode == 1, run.stderr
    found = {each["custom_id"]: each for each in map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())}
    assert {name: each["status"] for name, each in found.items()} == {
        "chat": "succeeded", "text": "succeeded", "bad": "rejected",
    }  # fmt: skip
    assert all(found[name]["text"].startswith("w0") for name in ("chat", "text"))
    assert found["chat"]["response"]["object"] == "chat.completion"
    assert found["bad"]["error"]["message"].startswith("temperature")
    assert Counter(worker.prompts) == Counter(["chat", "text"])


def test_few_lines_are_in_redis_at_a_time(
    web: WebStack, sdk: openai.OpenAI, start_worker: Callable[..., StubWorker]
) -> None:
    worker = start_worker()
    worker.hold.set()
    batch = create(sdk, jsonl([request_line(str(n)) for n in range(200)]))
    redis = web.client()
    eventually(lambda: len(redis.keys(keys.REQUEST + "*")) == 16, "the look-ahead is used")
    time.sleep(0.5)  # several rounds of the background process: nothing reports that it adds no further line
    assert len(redis.keys(keys.REQUEST + "*")) == 16
    sdk.batches.cancel(batch.id)
    worker.hold.clear()
    assert ended(sdk, batch).status == "cancelled"


def test_each_line_runs_once_over_kills_of_the_background_process(
    web: WebStack, sdk: openai.OpenAI, start_worker: Callable[..., StubWorker]
) -> None:
    worker = start_worker(slots=4, pause_s=0.01)
    lines = [request_line(str(n), max_tokens=4) for n in range(100)]
    batch = create(sdk, jsonl(lines))
    redis = web.client()

    def progress() -> int:
        counts = sdk.batches.retrieve(batch.id).request_counts
        return counts.completed if counts else 0

    for target in (20, 60):
        eventually(lambda target=target: progress() >= target, f"{target} lines are done", WITHIN_S)
        leader = web.background[-1]
        web.start_background()
        leader.kill()
        leader.wait()
    done = ended(sdk, batch)
    assert done.status == "completed" and done.request_counts is not None
    assert done.request_counts.to_dict() == {"total": 100, "completed": 100, "failed": 0}
    ids = [each["custom_id"] for each in results(sdk, done.output_file_id)]
    assert Counter(ids) == Counter(str(n) for n in range(100))
    jobs = [each["response"]["body"]["id"] for each in results(sdk, done.output_file_id)]
    assert len(set(jobs)) == 100
    assert Counter(worker.prompts) == Counter(ids), "no line ran twice"
    assert not redis.keys(keys.QUEUE + "*")
