"""Webhooks over real sockets: the API, background processes, a stub worker, and receivers of all kinds."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest
from openai.types.webhooks import BatchCompletedWebhookEvent
from standardwebhooks import Webhook, WebhookVerificationError

from shared.redis import keys
from tests.plugins.web_stack import StubWorker, WebStack, running_web
from tests.support.receivers import Receiver, unused_url
from tests.support.waiting import eventually

ATTEMPTS = 4
WITHIN_S = 60.0
SETTINGS = {
    "WEBHOOK_NETWORKS": "127.0.0.1/32",
    "WEBHOOK_ATTEMPTS": str(ATTEMPTS),
    "WEBHOOK_BACKOFF_S": "0.05",
    "WEBHOOK_TIMEOUT_S": "1",
}


@pytest.fixture(scope="module")
def web() -> Iterator[WebStack]:
    with running_web(**SETTINGS) as stack:
        stack.start_background()
        yield stack


@pytest.fixture
def admin(web: WebStack) -> Iterator[Callable[..., Any]]:
    """Calls the API with the scope `admin`; removes the endpoints that the test registers."""
    name = f"admin-{len(web.keys.list())}"
    headers = {"X-API-Key": web.keys.create(name, {"infer", "admin"})}

    def call(method: str, path: str, **body: Any) -> Any:
        response = web.http.request(method, f"/v1/webhooks{path}", headers=headers, json=body or None)
        assert response.is_success, response.text
        return response.json() if response.content else None

    eventually(lambda: web.http.get("/v1/webhooks", headers=headers).status_code == 200, "the API knows the new key")
    yield call
    for endpoint in call("GET", "")["data"]:
        call("DELETE", f"/{endpoint['id']}")


@pytest.fixture
def delivery(web: WebStack) -> Callable[[str], dict[str, Any]]:
    def read(webhook_id: str) -> dict[str, Any]:
        response = web.http.get(f"/v1/webhooks/deliveries/{webhook_id}")
        assert response.status_code == 200, response.text
        view: dict[str, Any] = response.json()
        return view

    return read


def secret_of(web: WebStack) -> str:
    secret: str = web.http.get("/v1/webhooks/secret").json()["secret"]
    return secret


def test_the_end_of_a_job_is_sent_signed_to_its_url(
    web: WebStack, start_worker: Callable[..., StubWorker], delivery: Callable[[str], dict[str, Any]]
) -> None:
    start_worker()
    with Receiver() as receiver:
        job = web.submit(max_tokens=2, webhook_url=receiver.url)
        eventually(lambda: receiver.confirmed, "the webhook arrives")
        received = receiver.received[0]
        event = Webhook(secret_of(web)).verify(received.body, received.headers)
        assert event == json.loads(received.body)
        assert (event["type"], event["object"], event["data"]) == ("job.succeeded", "event", {"id": job["id"]})
        with pytest.raises(WebhookVerificationError):
            Webhook(secret_of(web)).verify(received.body + b" ", received.headers)
        eventually(lambda: delivery(received.id)["status"] == "delivered", "it is recorded")
        assert delivery(received.id)["attempts"] == 1
        assert len(receiver.received) == 1


def test_only_the_requested_events_are_sent(web: WebStack, start_worker: Callable[..., StubWorker]) -> None:
    worker = start_worker()
    worker.hold.set()
    with Receiver() as receiver:
        options: dict[str, Any] = {"webhook_url": receiver.url, "webhook_events": ["job.cancelled"]}
        kept, cancelled = web.submit(max_tokens=2, **options), web.submit(max_tokens=2, **options)
        assert web.http.post(f"/v1/jobs/{cancelled['id']}/cancel").is_success
        worker.hold.clear()
        assert web.job(kept["id"], wait=20)["status"] == "succeeded"
        eventually(lambda: receiver.confirmed, "the webhook arrives")
        eventually(lambda: not web.client().exists(keys.WEBHOOK_OUTBOX, keys.WEBHOOKS_DUE), "nothing is left to send")
        events = [json.loads(each.body) for each in receiver.received]
        assert [(event["type"], event["data"]["id"]) for event in events] == [("job.cancelled", cancelled["id"])]


def test_a_secret_can_be_rotated_without_a_gap(web: WebStack, start_worker: Callable[..., StubWorker]) -> None:
    start_worker()
    old = secret_of(web)
    rotated = web.http.post("/v1/webhooks/secret/rotate", json={"overlap_s": 600}).json()
    assert rotated["secret"] == secret_of(web) != old and rotated["earlier"] == 1
    with Receiver() as receiver:
        web.submit(max_tokens=1, webhook_url=receiver.url)
        eventually(lambda: receiver.confirmed, "the webhook arrives")
        received = receiver.received[0]
        for secret in (old, rotated["secret"]):
            Webhook(secret).verify(received.body, received.headers)
        web.http.post("/v1/webhooks/secret/rotate", json={"overlap_s": 0})
        web.submit(max_tokens=1, webhook_url=receiver.url)
        eventually(lambda: len(receiver.confirmed) == 2, "the second webhook arrives")
        with pytest.raises(WebhookVerificationError):
            Webhook(old).verify(receiver.received[1].body, receiver.received[1].headers)


def test_a_registered_endpoint_receives_events_that_the_official_client_reads(
    web: WebStack, start_worker: Callable[..., StubWorker], admin: Callable[..., Any]
) -> None:
    start_worker()
    with Receiver() as receiver, openai.OpenAI(base_url=f"{web.url}/v1", api_key=web.key) as sdk:
        events = ["batch.completed", "batch.failed", "job.succeeded"]
        endpoint = admin("POST", "", url=receiver.url, events=events, description="night shift")
        assert "secret" not in admin("GET", f"/{endpoint['id']}")
        line = {
            "custom_id": "1", "method": "POST", "url": "/v1/chat/completions",
            "body": {"model": "stub", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1},
        }  # fmt: skip
        file = sdk.files.create(file=("a.jsonl", json.dumps(line).encode()), purpose="batch")
        batch = sdk.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
        eventually(lambda: receiver.confirmed, "the webhook arrives", WITHIN_S)
        received = receiver.received[0]
        event = sdk.webhooks.unwrap(received.body, received.headers, secret=endpoint["secret"])
        assert isinstance(event, BatchCompletedWebhookEvent) and event.data.id == batch.id
        job = web.submit(max_tokens=1)
        eventually(lambda: len(receiver.confirmed) == 2, "the job's webhook arrives")
        ids = [json.loads(each.body)["data"]["id"] for each in receiver.received]
        assert ids == [batch.id, job["id"]], "the lines of a batch have no events"
        rotated = admin("POST", f"/{endpoint['id']}/rotate", overlap_s=600)
        assert rotated["secret"] != endpoint["secret"]
        admin("DELETE", f"/{endpoint['id']}")
        assert admin("GET", "")["data"] == []


@pytest.mark.parametrize(
    "url",
    [
        "http://10.0.0.1/", "http://169.254.169.254/latest", "http://[::1]/", "http://127.0.0.2:8000/",
        "http://localhost.localdomain.invalid/", "ftp://127.0.0.1/", "http://user:pass@127.0.0.1/", "hello",
        "http://[::ffff:10.0.0.1]/",
    ],
)  # fmt: skip
def test_a_url_that_leads_to_a_private_address_is_refused(web: WebStack, admin: Callable[..., Any], url: str) -> None:
    before = set(web.client().keys(keys.JOB + "*"))
    response = web.http.post("/v1/jobs", json={"prompt": "hi", "webhook_url": url})
    assert (response.status_code, response.json()["code"]) == (422, "webhook_url_refused")
    assert response.json()["field"] == "webhook_url"
    assert set(web.client().keys(keys.JOB + "*")) == before
    headers = {"X-API-Key": web.keys.create(f"refused {url}", {"admin"})}
    eventually(lambda: web.http.get("/v1/webhooks", headers=headers).status_code == 200, "the API knows the new key")
    response = web.http.post("/v1/webhooks", json={"url": url, "events": ["job.failed"]}, headers=headers)
    assert (response.status_code, response.json()["error"]["code"]) == (400, "webhook_url_refused")
    assert admin("GET", "")["data"] == []


def test_events_without_a_url_are_refused(web: WebStack) -> None:
    response = web.http.post("/v1/jobs", json={"prompt": "hi", "webhook_events": ["job.failed"]})
    assert (response.status_code, response.json()["field"]) == (422, "webhook_events")


def test_endpoints_are_for_admins(web: WebStack) -> None:
    for method, path in (("GET", ""), ("POST", ""), ("GET", "/we_1"), ("DELETE", "/we_1"), ("POST", "/we_1/rotate")):
        body = {"url": "https://example.org/", "events": ["job.failed"]} if method == "POST" else None
        assert web.http.request(method, f"/v1/webhooks{path}", json=body).status_code == 403


def test_a_redirect_is_not_followed(
    web: WebStack, start_worker: Callable[..., StubWorker], delivery: Callable[[str], dict[str, Any]]
) -> None:
    start_worker()
    with Receiver(lambda *_: 307) as receiver:
        web.submit(max_tokens=1, webhook_url=receiver.url)
        eventually(lambda: receiver.received, "the webhook arrives")
        webhook_id = receiver.received[0].id
        eventually(lambda: delivery(webhook_id)["status"] == "dead", "all attempts fail", WITHIN_S)
        assert delivery(webhook_id)["last_status"] == 307
        assert len(receiver.received) == ATTEMPTS == delivery(webhook_id)["attempts"]


def test_a_receiver_that_is_gone_for_good_is_not_asked_again(
    web: WebStack, start_worker: Callable[..., StubWorker], delivery: Callable[[str], dict[str, Any]]
) -> None:
    start_worker()
    with Receiver(lambda *_: 410) as receiver:
        web.submit(max_tokens=1, webhook_url=receiver.url)
        eventually(lambda: receiver.received, "the webhook arrives")
        eventually(lambda: delivery(receiver.received[0].id)["status"] == "dead", "it is given up")
        assert len(receiver.received) == 1


def test_a_dead_delivery_is_listed_and_can_be_sent_again(
    web: WebStack, start_worker: Callable[..., StubWorker], delivery: Callable[[str], dict[str, Any]]
) -> None:
    start_worker()
    url = unused_url()
    job = web.submit(max_tokens=1, webhook_url=url)

    def dead() -> dict[str, Any] | None:
        listed = web.http.get("/v1/webhooks/deliveries").json()["data"]
        return next((each for each in listed if each["object_id"] == job["id"]), None)

    entry = eventually(dead, "the delivery is dead", WITHIN_S)
    assert entry is not None and (entry["attempts"], entry["status"], entry["url"]) == (ATTEMPTS, "dead", url)
    with Receiver(port=int(url.rsplit(":", 1)[1].strip("/"))) as receiver:
        response = web.http.post(f"/v1/webhooks/deliveries/{entry['id']}/resend")
        assert response.status_code == 202
        eventually(lambda: receiver.confirmed == [entry["id"]], "it is delivered under the same id")
        eventually(lambda: delivery(entry["id"])["status"] == "delivered", "it is recorded")
    assert dead() is None
    again = web.http.post(f"/v1/webhooks/deliveries/{entry['id']}/resend")
    assert (again.status_code, again.json()["error"]["code"]) == (409, "not_dead")


def half(number: int, webhook_id: str) -> int:
    """Fail every other attempt; some webhooks begin with a success."""
    return 200 if (number + sum(map(ord, webhook_id))) % 2 else 500


@pytest.mark.parametrize("events", [60, pytest.param(1000, marks=pytest.mark.long)])
def test_each_event_is_delivered_once_or_listed_as_dead(
    web: WebStack, start_worker: Callable[..., StubWorker], admin: Callable[..., Any], events: int
) -> None:
    start_worker()
    with Receiver() as good, Receiver(half) as flaky, Receiver(lambda *_: None) as hanging:
        urls = [good.url, flaky.url, hanging.url, unused_url()]
        jobs = [web.submit(max_tokens=1, webhook_url=urls[n % 4])["id"] for n in range(events)]
        redis = web.client()

        ids = set(jobs)

        def ended() -> dict[str, list[str]] | None:
            records = [redis.hgetall(name) for name in redis.scan_iter(match=keys.WEBHOOK + "*", count=1000)]
            mine = [record for record in records if record["object_id"] in ids]
            found = {name: [each["id"] for each in mine if each["status"] == name] for name in ("delivered", "dead")}
            return found if sum(map(len, found.values())) == events else None

        settled = eventually(ended, "each delivery ends", 20 * WITHIN_S)
        assert settled is not None and len(settled["dead"]) == events // 2
        assert sorted(settled["delivered"]) == sorted(good.confirmed + flaky.confirmed), "each was confirmed once"
        for receiver in (good, flaky, hanging):
            attempts = Counter(each.id for each in receiver.received)
            assert max(attempts.values()) <= ATTEMPTS
            assert len(attempts) == events // 4, "repeats keep their id"
            bodies = {(each.id, each.body) for each in receiver.received}
            assert len(bodies) == events // 4
        assert {redis.hget(keys.WEBHOOK + each, "attempts") for each in settled["dead"]} == {str(ATTEMPTS)}
        listed = admin("GET", "/deliveries?status=dead&limit=100")["data"]
        assert {each["id"] for each in listed} >= {*settled["dead"]} or len(listed) == 100


def test_no_event_is_lost_when_the_background_process_is_killed(
    web: WebStack, start_worker: Callable[..., StubWorker]
) -> None:
    start_worker()
    with Receiver(lambda number, _: 200 if number > 1 else 503) as receiver:
        jobs = set()
        for _ in range(2):
            jobs |= {web.submit(max_tokens=1, webhook_url=receiver.url)["id"] for _ in range(20)}
            eventually(lambda: receiver.received, "sending has begun")
            leader = web.background[-1]
            web.start_background()
            leader.kill()
            leader.wait()

        def delivered() -> set[str]:
            confirmed = set(receiver.confirmed)
            return {json.loads(each.body)["data"]["id"] for each in receiver.received if each.id in confirmed}

        eventually(lambda: delivered() == jobs, "each event is delivered", WITHIN_S)
        assert len({each.id for each in receiver.received}) == len(jobs)
