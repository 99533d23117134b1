"""The lease keeper and the housekeeper, round by round."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from redis import ConnectionError as RedisAway
from redis import ResponseError

from shared.jobs.record import Job, Status
from shared.jobs.request import Request, Sampling
from shared.jobs.store import Jobs, Submission
from shared.queue import keys
from shared.queue.claims import Claims, NoLease, Reaper, Verdict, Waiting
from shared.queue.redis import Redis
from shared.settings import Settings
from worker.queue.lease import Claim, Housekeeper, LeaseKeeper


class Desk:
    """A keeper, the claims it keeps, and what it did."""

    def __init__(self, client: Redis, settings: Settings) -> None:
        self.client = client
        self.jobs = Jobs(client, settings)
        self.claims = Claims(client, "w1")
        self.heard: list[tuple[str, int, Verdict]] = []
        self.held: set[Claim] = set()
        self.announced: list[bool] = []
        self.deaths: list[str] = []
        self.given_up = False
        self.keeper = LeaseKeeper(
            self.claims,
            lambda *word: self.heard.append(word),
            self.held,
            self.announced.append,
            60,
            3,
            lambda: self.given_up,
            self.deaths.append,
        )

    def submit(self) -> Job:
        return self.jobs.create(Submission(Request("fake", 4, Sampling(0.0), prompt="hello"), owner="me"))[0]

    def claim(self, *, known: bool = True) -> Job:
        self.submit()
        job = self.claims.claim("fake")
        assert job is not None
        if known:
            self.held.add((job.id, job.attempt))
        return job

    def status(self, job: Job) -> Status:
        return self.jobs.get(job.id, "me").status

    def lapse(self) -> None:
        """The lease runs out unnoticed, and somebody reaps."""
        self.client.zadd(keys.LEASES, {"w1": 1})
        Reaper(self.client, 3).reap()


def at_fault(*_: object) -> None:
    raise ResponseError("ERR user_script:12: attempt to index a nil value")


@pytest.fixture
def desk(client: Redis, settings: Settings) -> Desk:
    return Desk(client, settings)


def test_a_round_renews_and_tells_who_we_are(desk: Desk) -> None:
    with pytest.raises(NoLease):
        desk.claims.claim("fake")
    desk.keeper.round()
    desk.keeper.round()
    assert desk.claims.claim("fake") is None
    assert desk.announced == [True, False]


def test_a_stop_word_reaches_the_engine(desk: Desk) -> None:
    desk.keeper.round()
    job = desk.claim()
    desk.jobs.stop(job.id, "me")
    desk.keeper.round()
    assert desk.heard == [(job.id, 1, Verdict.CANCELLED)]


def test_a_claim_whose_answer_was_lost_goes_back_after_two_rounds(desk: Desk) -> None:
    desk.keeper.round()
    known, lost = desk.claim(), desk.claim(known=False)
    desk.keeper.round()
    assert desk.status(lost) is Status.RUNNING
    desk.keeper.round()
    assert (desk.status(lost), desk.status(known)) == (Status.QUEUED, Status.RUNNING)


def test_a_job_whose_record_cannot_be_read_ends(desk: Desk) -> None:
    desk.keeper.round()
    job = desk.submit()
    desk.client.hset(keys.JOB + job.id, "metadata", "{")
    for _ in range(3):
        with pytest.raises(ValueError, match="Expecting"):
            desk.claims.claim("fake")
        desk.keeper.round()
        desk.keeper.round()
    assert desk.client.hget(keys.JOB + job.id, "status") == Status.FAILED
    assert desk.claims.claim("fake") is None


def test_a_claim_that_becomes_known_in_time_stays(desk: Desk) -> None:
    desk.keeper.round()
    job = desk.claim(known=False)
    desk.keeper.round()
    desk.held.add((job.id, job.attempt))
    desk.keeper.round()
    assert desk.status(job) is Status.RUNNING


def test_after_a_lapse_the_jobs_that_are_others_are_dropped(desk: Desk) -> None:
    desk.keeper.round()
    lost = desk.claim()
    desk.lapse()
    desk.keeper.round()
    assert desk.heard == [(lost.id, 1, Verdict.FENCED)]
    assert desk.announced == [True, True]


def test_a_lapse_that_nobody_noticed_costs_nothing(desk: Desk) -> None:
    desk.keeper.round()
    job = desk.claim()
    desk.client.zadd(keys.LEASES, {"w1": 1})
    desk.keeper.round()
    assert (desk.heard, desk.status(job)) == ([], Status.RUNNING)


def test_redis_away_is_borne(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(seconds: float) -> None:
        raise RedisAway

    with monkeypatch.context() as patch:
        patch.setattr(desk.claims, "renew", away)
        desk.keeper.round()
        desk.keeper.round()
    desk.keeper.round()
    assert (desk.announced, desk.deaths) == ([True], [])


def test_a_renewal_that_is_at_fault_ends_the_process(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(desk.claims, "renew", at_fault)
    desk.keeper.start()
    desk.keeper.join(5)
    assert desk.deaths == ["its lease thread died (ResponseError)"]


def test_housekeeping_that_is_at_fault_is_told_and_goes_on(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    office = Office()
    reaper = Reaper(desk.client, 3)
    housekeeper = Housekeeper(reaper, office, desk.deaths.append)  # type: ignore[arg-type]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reaper, "reap", at_fault)
        housekeeper.round()
    housekeeper.round()
    assert ("housekeeping failed" in caplog.text, desk.deaths, office.rescues) == (True, [], 1)


def test_who_waits_for_a_renewal_is_woken(desk: Desk) -> None:
    assert not desk.keeper.wait_renewal(0.01)
    desk.keeper.start()
    assert desk.keeper.wait_renewal(5) or desk.announced
    desk.keeper.stop()
    assert not desk.keeper.is_alive()


def test_a_process_that_cannot_go_on_lets_its_lease_lapse(desk: Desk) -> None:
    desk.keeper.round()
    renewed = desk.client.zscore(keys.LEASES, "w1")
    desk.given_up = True
    desk.keeper.round()
    assert (desk.client.zscore(keys.LEASES, "w1"), desk.announced) == (renewed, [True])


class Office:
    """Takes note of tickets."""

    def __init__(self) -> None:
        self.sent: list[str] = []
        self.rescues = 0

    def send_all(self, waiting: list[Waiting]) -> None:
        self.sent += [each.job_id for each in waiting]

    def rescue(self) -> None:
        self.rescues += 1


def test_the_housekeeper_sends_tickets_for_what_a_dead_worker_held(desk: Desk) -> None:
    office = Office()
    housekeeper = Housekeeper(Reaper(desk.client, 3), office, desk.deaths.append)  # type: ignore[arg-type]
    desk.keeper.round()
    job = desk.claim()
    housekeeper.round()
    assert (office.sent, office.rescues) == ([], 1)
    desk.client.zadd(keys.LEASES, {"w1": 1})
    housekeeper.round()
    assert (office.sent, desk.status(job)) == ([job.id], Status.QUEUED)


def test_the_housekeeper_comes_when_the_next_lease_may_lapse(desk: Desk, eventually: Callable[..., None]) -> None:
    reaper, passes = Reaper(desk.client, 3), 0
    reap = reaper.reap

    def count() -> list[Waiting]:
        nonlocal passes
        passes += 1
        waiting = reap()
        reaper.rest_s = 0.01
        return waiting

    reaper.reap = count  # type: ignore[method-assign]
    housekeeper = Housekeeper(reaper, Office(), desk.deaths.append)  # type: ignore[arg-type]
    housekeeper.start()
    eventually(lambda: passes > 20)
    housekeeper.stop()
    assert desk.deaths == []
