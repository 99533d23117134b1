"""Signatures and secrets, the delivery queue, URLs that may be reached, and the election of a leader."""

from __future__ import annotations

import json
import threading
import time

import pytest
from standardwebhooks import Webhook, WebhookVerificationError

from shared.errors import Conflict, Invalid, NotFound
from shared.jobs.record import Status
from shared.jobs.store import Jobs
from shared.jobs.submission import NO_WEBHOOKS, Submission
from shared.redis import keys
from shared.redis.client import Redis
from shared.settings import Settings
from tests.support.queueing import submission
from tests.support.receivers import Receiver
from web.background.leader import LEASE_S, Leadership
from web.http.outbound import Outbound
from web.webhooks.deliveries import MAX_BACKOFF_S, Deliveries, Delivery, DeliveryStatus
from web.webhooks.receivers import MAX_ENDPOINTS, Receivers, UrlPolicy
from web.webhooks.sender import Sender
from web.webhooks.signing import MAX_SECRETS, Secret, headers, new_secret, rotate, valid_secrets

LEADER, URL = "leader-1", "https://example.org/hooks"
HOOK = json.dumps({"url": URL, "events": ["job.cancelled"]})


@pytest.fixture
def deliveries(client: Redis) -> Deliveries:
    client.set(keys.LEADER, LEADER)
    return Deliveries(client, max_attempts=3, backoff_s=5.0)


@pytest.fixture
def jobs(client: Redis) -> Jobs:
    return Jobs(client, Settings(durable=False))


def cancelled(jobs: Jobs, webhook: str = HOOK) -> str:
    """End a job; return its id."""
    built: Submission = submission(webhook=webhook)
    job = jobs.create(built).job
    assert jobs.stop(job.id, job.owner).status is Status.CANCELLED
    return job.id


def only(deliveries: Deliveries) -> Delivery:
    (delivery_id,) = deliveries.due(10)
    (delivery,) = deliveries.read([delivery_id])
    return delivery


def test_signatures_are_those_of_the_specification() -> None:
    secret, body = new_secret(), b'{"type":"job.failed"}'
    signed = headers([Secret(secret)], "wh_1", int(time.time()), body)
    assert Webhook(secret).verify(body, signed) == {"type": "job.failed"}
    with pytest.raises(WebhookVerificationError):
        Webhook(new_secret()).verify(body, signed)


def test_an_earlier_secret_is_valid_until_the_overlap_ends() -> None:
    first = [Secret(new_secret())]
    second = rotate(first, now=100.0, overlap_s=50.0)
    assert [secret.text for secret in valid_secrets(second, 149.0)] == [second[0].text, first[0].text]
    assert valid_secrets(second, 151.0) == second[:1]
    assert rotate(second, now=120.0, overlap_s=0.0)[1:] == []
    third = rotate(second, now=120.0, overlap_s=1000.0)
    assert third[2].expires_at == 150.0, "a rotation does not extend an overlap"
    many = second
    for n in range(10):
        many = rotate(many, now=200.0 + n, overlap_s=1000.0)
    assert len(many) == MAX_SECRETS


def test_an_event_becomes_a_delivery_once(client: Redis, deliveries: Deliveries, jobs: Jobs) -> None:
    job_id = cancelled(jobs)
    cancelled(jobs, "")
    cancelled(jobs, NO_WEBHOOKS)
    cancelled(jobs, json.dumps({"url": URL, "events": ["job.failed"]}))
    assert client.lrange(keys.WEBHOOK_OUTBOX, 0, -1) and deliveries.fan_out("another") == 0
    assert deliveries.fan_out(LEADER) == 2
    delivery = only(deliveries)
    assert (delivery.kind, delivery.object_id, delivery.url, delivery.endpoint) == ("job.cancelled", job_id, URL, "")
    assert json.loads(delivery.body())["data"] == {"id": job_id}


def test_registered_endpoints_receive_the_events_that_they_want(
    client: Redis, deliveries: Deliveries, jobs: Jobs
) -> None:
    receivers = Receivers(client)
    endpoint = receivers.register(URL, ["job.cancelled"], "")
    receivers.register(URL, ["batch.completed"], "")
    cancelled(jobs, "")
    cancelled(jobs, NO_WEBHOOKS)
    deliveries.fan_out(LEADER)
    assert only(deliveries).endpoint == endpoint.id
    receivers.remove(endpoint.id)
    with pytest.raises(NotFound):
        receivers.secrets_for(endpoint.id, "me")


def test_the_number_of_endpoints_is_bounded(client: Redis) -> None:
    receivers = Receivers(client)
    for _ in range(MAX_ENDPOINTS):
        receivers.register(URL, ["job.failed"], "")
    with pytest.raises(Conflict):
        receivers.register(URL, ["job.failed"], "")


def test_the_outbox_is_bounded(client: Redis, jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    client.rpush(keys.WEBHOOK_OUTBOX, *(["{}"] * 100_000))
    cancelled(jobs)
    assert client.llen(keys.WEBHOOK_OUTBOX) == 100_000
    assert client.hget(keys.WEBHOOK_COUNTS, "dropped") == "1"


def test_attempts_end_with_a_confirmation_or_with_the_last_one(deliveries: Deliveries, jobs: Jobs) -> None:
    cancelled(jobs)
    deliveries.fan_out(LEADER)
    delivery_id = only(deliveries).id
    assert deliveries.begin_attempt(delivery_id, "another", 1) is None
    for attempt in (1, 2):
        begun = deliveries.begin_attempt(delivery_id, LEADER, 1)
        assert begun is not None and begun.attempts == attempt
        assert deliveries.due(10) == [], "no second attempt begins meanwhile"
        assert deliveries.fail(begun, 500, "x" * 1000)
    last = deliveries.begin_attempt(delivery_id, LEADER, 1)
    assert last is not None and not deliveries.fail(last, None, "gone")
    dead = deliveries.get(delivery_id, None)
    assert (dead.status, dead.attempts, dead.last_error) == (DeliveryStatus.DEAD, 3, "gone")
    assert [each.id for each in deliveries.list(DeliveryStatus.DEAD, None, 10)] == [delivery_id]
    assert deliveries.begin_attempt(delivery_id, LEADER, 1) is None
    again = deliveries.resend(dead)
    assert (again.status, again.attempts) == (DeliveryStatus.PENDING, 0)
    begun = deliveries.begin_attempt(delivery_id, LEADER, 1)
    assert begun is not None
    deliveries.succeed(begun, 204)
    deliveries.fail(begun, 500, "a late report")
    confirmed = deliveries.get(delivery_id, None)
    assert (confirmed.status, confirmed.last_status) == (DeliveryStatus.DELIVERED, 204)
    with pytest.raises(Conflict):
        deliveries.resend(confirmed)
    assert deliveries.begin_attempt(delivery_id, LEADER, 1) is None


def test_a_delivery_is_visible_to_the_owner_of_the_job(deliveries: Deliveries, jobs: Jobs) -> None:
    cancelled(jobs)
    deliveries.fan_out(LEADER)
    delivery = only(deliveries)
    assert deliveries.get(delivery.id, delivery.owner).id == delivery.id
    with pytest.raises(NotFound):
        deliveries.get(delivery.id, "another-owner")
    assert deliveries.list(DeliveryStatus.PENDING, "another-owner", 10) == []


def test_pauses_grow_and_are_bounded(deliveries: Deliveries) -> None:
    pauses = [deliveries.backoff_s(attempts) for attempts in range(1, 11)]
    for n, pause in enumerate(pauses):
        expected = min(5.0 * 4**n, MAX_BACKOFF_S)
        assert 0.75 * expected <= pause <= 1.25 * expected
    assert len({deliveries.backoff_s(1) for _ in range(10)}) > 1, "with jitter"
    assert 15 * 3600 < sum(pauses[:9]) < 25 * 3600


@pytest.mark.parametrize("url", ["http://10.1.2.3/", "http://[::1]/", "http://127.0.0.1/", "http://100.64.0.1/"])
def test_private_addresses_need_permission(url: str) -> None:
    with pytest.raises(Invalid) as refused:
        UrlPolicy().check(url, "webhook_url", "me")
    assert (refused.value.code, refused.value.field) == ("webhook_url_refused", "webhook_url")
    UrlPolicy("10.0.0.0/8, ::1,127.0.0.0/8 ,100.64.0.0/10").check(url, "webhook_url", "me")


def test_one_process_leads_at_a_time(client: Redis) -> None:
    first, second = Leadership(client), Leadership(client)
    assert first.acquire() and first.valid
    assert not second.acquire() and not second.valid
    assert 0 < client.pttl(keys.LEADER) <= LEASE_S * 1000
    first.release()
    assert not first.valid and second.acquire()
    client.delete(keys.LEADER)
    assert first.acquire()
    second.hold(threading.Event())  # returns at the next renewal
    assert not second.valid and first.valid


def test_a_name_is_resolved_and_checked_again_for_each_attempt(
    client: Redis, deliveries: Deliveries, jobs: Jobs
) -> None:
    permitted, private = ["127.0.0.1"], ["127.0.0.1", "10.0.0.1"]
    answers = [permitted, private, permitted]
    policy = UrlPolicy("127.0.0.1/32")
    policy.outbound = Outbound(lambda *_: answers.pop(0), policy.is_allowed)
    sender = Sender(deliveries, Receivers(client), policy, 5.0, lambda: LEADER, lambda: True)

    def attempt() -> Delivery:
        sender.round()
        sender._pool.join(10)
        (delivery_id,) = [name.removeprefix(keys.WEBHOOK) for name in client.keys(keys.WEBHOOK + "*")]
        client.zadd(keys.WEBHOOKS_DUE, {delivery_id: 0}, xx=True)
        return deliveries.get(delivery_id, None)

    with Receiver() as receiver:
        url = receiver.url.replace("127.0.0.1", "rebinding.example")
        policy.check(url, "webhook_url", "me")
        cancelled(jobs, json.dumps({"url": url, "events": ["job.cancelled"]}))
        refused = attempt()
        assert (refused.status, refused.attempts, receiver.received) == (DeliveryStatus.PENDING, 1, [])
        assert refused.last_error == "The host of the URL must have only public addresses."
        assert attempt().status is DeliveryStatus.DELIVERED
        assert len(receiver.received) == 1 and not answers
