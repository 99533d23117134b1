"""Jobs over HTTP: submitting, polling, listing, cancelling, deleting and repeating them."""

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import httpx2
import psutil
import pytest

from shared.jobs.record import Ending, Status
from shared.models.registry import ModelCard, Registry
from shared.queue.claims import Append, Claims, Demand
from shared.redis import keys
from shared.redis.client import Redis
from tests.plugins.web_stack import MODEL, StubWorker, WebStack, running_web
from tests.support.waiting import eventually
from web.access.api_keys import new_key

pytestmark = pytest.mark.usefixtures("empty")
StartWorker = Callable[..., StubWorker]


@pytest.fixture
def empty(web: WebStack) -> None:
    client = web.client()
    client.flushall()
    client.close()
    # The API's snapshot of workers and models can be half a second old.
    eventually(
        lambda: not web.http.get("/inference/models").json()["data"][0]["workers"], "no workers are listed", within_s=5
    )


def test_a_job_is_accepted_with_its_position(web: WebStack) -> None:
    first = web.submit(max_tokens=3, metadata={"a": "b"})
    response = web.http.post("/v1/jobs", json={"prompt": "hi"}, headers={"X-Request-ID": "mine-1"})
    second = response.json()

    assert response.status_code == 202
    assert response.headers["Location"] == second["urls"]["self"] == f"/v1/jobs/{second['id']}"
    assert response.headers["X-Request-ID"] == "mine-1"
    assert (first["queue_position"], second["queue_position"]) == (1, 2)
    assert first["status"] == "queued" and first["estimated_start_s"] is None and first["metadata"] == {"a": "b"}
    client = web.client()
    assert client.hget(f"mlxq:job:{second['id']}", "request_id") == "mine-1"
    client.close()


def test_a_long_poll_returns_when_the_job_ends(web: WebStack, start_worker: StartWorker) -> None:
    worker = start_worker()
    worker.hold.set()
    job = web.submit(max_tokens=5)
    assert web.job(job["id"], wait=0.1)["status"] in ("queued", "running")
    worker.hold.clear()
    ended = web.job(job["id"], wait=20)
    assert ended["status"] == "succeeded"
    assert ended["output"] == {"text": "w0 é🙂\nw1 w2 w3 w4 ", "finish_reason": "length", "logprobs": None}
    assert ended["usage"]["completion_tokens"] == 5


def test_prefer_wait_returns_the_ended_job(web: WebStack, start_worker: StartWorker) -> None:
    start_worker()
    response = web.http.post("/v1/jobs", json={"prompt": "hi", "max_tokens": 2}, headers={"Prefer": "wait=20"})
    assert response.status_code == 200
    assert response.headers["Preference-Applied"] == "wait=20"
    assert response.json()["status"] == "succeeded"


def test_prefer_wait_returns_after_the_given_time(web: WebStack) -> None:
    sent_at = time.monotonic()
    response = web.http.post("/v1/jobs", json={"prompt": "hi"}, headers={"Prefer": "respond-async, wait=1"})
    assert response.status_code == 202
    assert time.monotonic() - sent_at > 0.9


def test_a_repeated_request_returns_the_same_job(web: WebStack) -> None:
    def post(body: dict[str, object]) -> tuple[int, str | None, dict[str, object]]:
        response = web.http.post("/v1/jobs", json=body, headers={"Idempotency-Key": "one"})
        return response.status_code, response.headers.get("Idempotency-Replayed"), response.json()

    status, replayed, first = post({"prompt": "hi"})
    assert (status, replayed) == (202, None)
    status, replayed, again = post({"prompt": "hi"})
    assert (status, replayed, again["id"]) == (202, "true", first["id"])
    status, _, refused = post({"prompt": "other"})
    assert (status, refused["code"], refused["field"]) == (422, "idempotency_key_reused", "Idempotency-Key")
    elsewhere = web.http.post("/inference", json={"prompt": "hi"}, headers={"Idempotency-Key": "one"})
    assert (elsewhere.status_code, elsewhere.json()["code"]) == (422, "idempotency_key_reused")
    assert [job["id"] for job in web.http.get("/v1/jobs").json()["data"]] == [first["id"]]


def submit_with_key(web: WebStack, content: str, key: str = "mine", **headers: str) -> tuple[int, str, bool]:
    """Submit with an Idempotency-Key; return the status, the job's id and whether the response is a replay."""
    all_headers = {"Content-Type": "application/json", "Idempotency-Key": key, **headers}
    response = web.http.post("/v1/jobs", content=content, headers=all_headers)
    return response.status_code, response.json()["id"], response.headers.get("Idempotency-Replayed") == "true"


def test_equivalent_json_is_the_same_request(web: WebStack) -> None:
    _, first, _ = submit_with_key(web, '{"prompt": "é", "max_tokens": 3, "metadata": {"a": "1", "b": "2"}}')
    for same in (
        '{"metadata":{"b":"2","a":"1"},"max_tokens":3,"prompt":"é"}',
        '{"prompt": "\\u00e9", "max_tokens": 3, "metadata": {"a": "1", "b": "2"}, "top_p": 1.0, "seed": null}\n\n',
    ):
        assert submit_with_key(web, same) == (202, first, True)


def test_a_large_repeated_request_is_recognised(web: WebStack) -> None:
    large = json.dumps({"messages": [{"role": "user", "content": "hi " * 50_000}]})
    _, first, _ = submit_with_key(web, large)
    assert submit_with_key(web, " " + large) == (202, first, True)


def test_idempotency_keys_are_separate_for_each_api_key(web: WebStack) -> None:
    other = web.keys.create(f"other-{new_key()}", ["infer"])
    _, mine, _ = submit_with_key(web, '{"prompt": "hi"}')
    status, theirs, replayed = submit_with_key(web, '{"prompt": "ho"}', **{"X-API-Key": other})
    assert (status, replayed) == (202, False) and theirs != mine
    assert submit_with_key(web, '{"prompt": "ho"}', **{"X-API-Key": other}) == (202, theirs, True)
    assert submit_with_key(web, '{"prompt": "hi"}') == (202, mine, True)


def test_concurrent_requests_with_one_key_create_one_job(web: WebStack) -> None:
    with ThreadPoolExecutor(16) as pool:
        responses = list(pool.map(lambda _: submit_with_key(web, '{"prompt": "hi"}'), range(48)))
    assert len({job for _, job, _ in responses}) == 1
    assert [replayed for _, _, replayed in responses].count(False) == 1
    client = web.client()
    assert client.zcard(keys.QUEUE + MODEL) == 1
    client.close()


def test_a_key_returns_its_job_whatever_its_status_until_it_is_deleted(web: WebStack) -> None:
    client = web.client()
    worker = Claims(client, "w9")
    worker.renew(60)

    def end(job: str, ending: Ending) -> None:
        (claimed,) = worker.claim(MODEL, Demand(rows=1, tokens=100_000)).jobs
        assert claimed.job.id == job
        start = Append(job, 1, claimed.job.claimed_at, 3, start=True)
        worker.append([start])
        assert submit_with_key(web, body, ending.status) == (202, job, True), "a running job is returned too"
        worker.append([replace(start, start=False, ending=ending)])

    for status in (Status.SUCCEEDED, Status.FAILED, Status.CANCELLED, Status.EXPIRED):
        limit = 0.1 if status is Status.EXPIRED else 600
        body = json.dumps({"prompt": status, "start_within_s": limit})
        _, job, _ = submit_with_key(web, body, status)
        assert client.ttl(idempotency_key := redis_name_of_key(client, status)) == -1
        match status:
            case Status.CANCELLED:
                web.http.post(f"/v1/jobs/{job}/cancel")
            case Status.EXPIRED:
                web.job(job, wait=20)
            case _:
                end(job, Ending(status, error_code="engine_error" if status is Status.FAILED else None))
        assert web.job(job)["status"] == status
        assert submit_with_key(web, body, status) == (200, job, True)
        assert client.expiretime(idempotency_key) == client.expiretime(f"mlxq:job:{job}") > 0
        assert web.http.delete(f"/v1/jobs/{job}").status_code == 204
        code, following, replayed = submit_with_key(web, json.dumps({"prompt": "another"}), status)
        assert (code, replayed) == (202, False) and following != job
        web.http.post(f"/v1/jobs/{following}/cancel")
    client.close()


def redis_name_of_key(client: Redis, key: str) -> str:
    (name,) = client.keys(f"mlxq:idem:*:{key}")
    return str(name)


def test_a_key_is_free_again_after_the_retention_of_its_job() -> None:
    with running_web(RETENTION_S="1") as web:
        _, job, _ = submit_with_key(web, '{"prompt": "hi"}')
        web.http.post(f"/v1/jobs/{job}/cancel")
        eventually(lambda: web.http.get(f"/v1/jobs/{job}").status_code == 404, "the job is deleted")
        status, following, replayed = submit_with_key(web, '{"prompt": "another"}')
        assert (status, replayed) == (202, False) and following != job


def test_the_list_pages_through_the_callers_own_jobs(web: WebStack) -> None:
    ids = [web.submit()["id"] for _ in range(5)]
    seen, before = [], None
    while True:
        page = web.http.get("/v1/jobs", params={"limit": 2} | ({"before": before} if before else {})).json()
        seen += [job["id"] for job in page["data"]]
        before = page["next"]
        if before is None:
            break
    assert seen == ids[::-1]


def test_jobs_of_another_api_key_are_not_found(web: WebStack) -> None:
    job = web.submit()
    other = {"X-API-Key": web.keys.create(f"other-{new_key()}", ["infer"])}
    for method, path in (("GET", ""), ("POST", "/cancel"), ("DELETE", ""), ("GET", "/stream")):
        response = web.http.request(method, f"/v1/jobs/{job['id']}{path}", headers=other)
        assert (response.status_code, response.json()["code"]) == (404, "job_not_found")
    assert web.http.get("/v1/jobs", headers=other).json()["data"] == []


def test_a_waiting_job_is_cancelled_at_once_and_can_then_be_deleted(web: WebStack) -> None:
    path = web.submit()["urls"]["self"]
    refused = web.http.delete(path)
    assert (refused.status_code, refused.json()["code"]) == (409, "job_active")
    cancelled = web.http.post(f"{path}/cancel")
    assert (cancelled.status_code, cancelled.json()["status"]) == (200, "cancelled")
    assert web.http.post(f"{path}/cancel").status_code == 200
    assert web.http.delete(path).status_code == 204
    assert web.http.get(path).status_code == 404


def test_a_running_job_is_reported_cancelled_only_after_it_has_ended(
    web: WebStack, start_worker: StartWorker, eventually: Callable[..., None]
) -> None:
    worker = start_worker(pause_s=0.2)
    worker.hold.set()
    job = web.submit(max_tokens=50)
    eventually(lambda: web.job(job["id"])["status"] == "running")
    response = web.http.post(job["urls"]["cancel"])
    assert response.status_code in (200, 202)
    assert (response.status_code == 200) == (response.json()["status"] == "cancelled")
    assert web.job(job["id"], wait=10)["status"] == "cancelled"


def test_cancel_can_wait_for_the_end(web: WebStack, start_worker: StartWorker, eventually: Callable[..., None]) -> None:
    worker = start_worker()
    worker.hold.set()
    job = web.submit(max_tokens=50)
    eventually(lambda: web.job(job["id"])["status"] == "running")
    response = web.http.post(job["urls"]["cancel"], params={"wait": 10})
    assert (response.status_code, response.json()["status"]) == (200, "cancelled")


def test_an_ended_job_cannot_be_cancelled(web: WebStack, start_worker: StartWorker) -> None:
    start_worker()
    job = web.submit(max_tokens=1)
    web.job(job["id"], wait=10)
    response = web.http.post(job["urls"]["cancel"])
    assert (response.status_code, response.json()["code"]) == (409, "job_ended")


def test_the_estimate_is_zero_while_a_slot_is_free(web: WebStack, start_worker: StartWorker) -> None:
    start_worker(slots=4, pause_s=0.5)
    web.http.get("/inference/models")
    assert web.submit(max_tokens=1)["estimated_start_s"] in (0.0, None)


def test_inference_returns_the_complete_text(web: WebStack, start_worker: StartWorker) -> None:
    start_worker()
    response = web.http.post("/inference", json={"prompt": "hi", "max_tokens": 3})
    assert response.status_code == 200
    body = response.json()
    assert (body["text"], body["finish_reason"], body["model"]) == ("w0 é🙂\nw1 w2 ", "length", MODEL)
    assert response.headers["Location"] == f"/v1/jobs/{body['id']}"


def test_not_started_and_not_finished_jobs_expire_with_different_codes(
    web: WebStack, start_worker: StartWorker
) -> None:
    never = web.job(web.submit(start_within_s=0.1)["id"], wait=20)
    refused = web.http.post("/inference", json={"prompt": "hi", "start_within_s": 0.1})
    worker = start_worker()
    worker.hold.set()
    cut = web.submit(max_tokens=5, deadline_s=0.3)
    eventually(lambda: web.job(cut["id"])["started_at"], "it starts")
    with web.http.stream("GET", cut["urls"]["stream"]) as response:
        done = [line for line in response.iter_lines() if line.startswith("data: ")][-1]

    assert (never["status"], never["error"]["code"], never["started_at"]) == ("expired", "start_timeout", None)
    assert never["error"]["message"] == "The job did not start within 0.1 s (start_within_s)."
    assert (refused.status_code, refused.json()["code"]) == (504, "start_timeout")
    assert refused.json()["detail"] == never["error"]["message"]
    cut = web.job(cut["id"], wait=20)
    assert (cut["status"], cut["error"]["code"]) == ("expired", "deadline_exceeded")
    assert json.loads(done.removeprefix("data: ")) == cut


def test_a_repeated_inference_is_marked_as_a_replay(web: WebStack, start_worker: StartWorker) -> None:
    start_worker()
    responses = [
        web.http.post("/inference", json={"prompt": "hi", "max_tokens": 3}, headers={"Idempotency-Key": "one"})
        for _ in range(2)
    ]
    assert [response.headers.get("Idempotency-Replayed") for response in responses] == [None, "true"]
    assert responses[0].json() == responses[1].json()


def test_inference_reports_an_exceeded_deadline(web: WebStack, start_worker: StartWorker) -> None:
    worker = start_worker(pause_s=0.02)
    response = web.http.post("/inference", json={"prompt": "hi", "max_tokens": 1000, "deadline_s": 0.3})
    assert (response.status_code, response.json()["code"]) == (504, "deadline_exceeded")
    (job,) = web.http.get("/v1/jobs").json()["data"]
    assert job["output"]["text"].startswith("w0 ") and not worker.hold.is_set()
    assert [(each["attempt"], each["outcome"]) for each in job["history"]] == [(1, "ended")]


def test_models_list_their_workers(web: WebStack, start_worker: StartWorker, eventually: Callable[..., None]) -> None:
    start_worker(slots=7)
    eventually(lambda: web.http.get("/inference/models").json()["data"][0]["state"] == "warm")
    (model,) = web.http.post("/inference/models").json()["data"]
    assert model["id"] == MODEL and model["default"] and model["slots"] == 7 and model["context"] == 4096


def test_api_keys_are_created_and_revoked_without_a_restart(web: WebStack) -> None:
    name = f"guest-{new_key()}"
    key = web.keys.create(name, ["infer"])
    bearer = {"Authorization": f"Bearer {key}", "X-API-Key": ""}
    assert web.http.get("/v1/jobs", headers=bearer).status_code == 200
    web.keys.revoke(name)
    refused = web.http.get("/v1/jobs", headers=bearer)
    assert refused.status_code == 401 and refused.headers["WWW-Authenticate"].startswith("Bearer")


def test_the_access_log_has_the_ids_of_request_key_and_job(web: WebStack) -> None:
    headers = {"X-Request-ID": "seen-in-the-log"}
    job = web.http.post("/v1/jobs", json={"prompt": "never logged"}, headers=headers).json()
    web.http.get(f"/v1/jobs/{job['id']}", headers=headers)

    def lines() -> list[dict[str, Any]]:
        found = [json.loads(line) for line in web.log.read_text().splitlines() if line.startswith("{")]
        return [
            line for line in found if line["logger"] == "web.access" and line.get("request_id") == "seen-in-the-log"
        ]

    eventually(lambda: len(lines()) == 2, "the lines are written")  # after the responses were sent
    assert {(line["job_id"], line["key"]) for line in lines()} == {(job["id"], web.key.split("_")[1])}
    assert "never logged" not in web.log.read_text()


def test_metrics_count_jobs_and_workers(web: WebStack, start_worker: StartWorker) -> None:
    start_worker()
    job = web.submit(max_tokens=1)
    web.job(job["id"], wait=10)
    page = web.http.get("/metrics").text
    assert f'mlxq_jobs_submitted_total{{model="{MODEL}",priority="normal"}}' in page
    assert f'mlxq_jobs_ended_total{{model="{MODEL}",status="succeeded"}} 1.0' in page
    assert f'mlxq_worker_slots{{model="{MODEL}",worker="w1@stub"}} 128.0' in page
    assert f'mlxq_worker_tokens_total{{model="{MODEL}",worker="w1@stub"}} 1.0' in page
    assert "mlxq_redis_up 1.0" in page


def test_metrics_of_several_processes_are_summed_also_after_one_was_killed() -> None:
    def pages(web: WebStack) -> list[str]:
        """Return the page several times, over connections that any process may accept."""
        found = []
        for _ in range(6):
            with httpx2.Client(base_url=web.url, headers=web.http.headers) as one_connection:
                found.append(one_connection.get("/metrics").text)
        return found

    expected = {
        f'mlxq_jobs_submitted_total{{model="{MODEL}",priority="normal"}} 20.0',
        f'mlxq_jobs_waiting{{model="{MODEL}",priority="normal"}} 20.0',
    }
    with running_web(WEB_WORKERS="2") as web:
        Registry(web.client()).announce_model(ModelCard(MODEL, "text", 64))
        for _ in range(20):
            with httpx2.Client(base_url=web.url, headers=web.http.headers) as one_connection:
                assert one_connection.post("/v1/jobs", json={"prompt": "hi"}).status_code == 202
        before = pages(web)
        gunicorn = psutil.Process(web.process.pid)
        [killed, other] = gunicorn.children()
        killed.kill()
        eventually(lambda: len({*gunicorn.children()} - {killed, other}) == 1, "gunicorn starts another process")
        eventually(lambda: web.http.get("/livez").status_code == 200, "it answers")
        after = pages(web)
    assert all(expected <= {*page.splitlines()} for page in before + after)
