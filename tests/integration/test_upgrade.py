"""The present stack on data that an earlier commit left behind."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from scripts.client.api import Client
from scripts.stack.ports import free_port
from shared.jobs.log import EventKind
from shared.queue import keys
from shared.queue.maintenance import ADOPT_AGAIN_S
from shared.queue.redis import Redis, connect
from shared.settings import ROOT
from tests.bench import job_load
from tests.bench.checkouts import Checkout
from tests.bench.endpoints import Own
from tests.bench.processes import process, wait_until
from tests.support import upgrade_data
from tests.support.waiting import eventually

pytestmark = pytest.mark.slow

STORED = ROOT / "tests/data/upgrade-81e8d55"
JOBS: dict[str, dict[str, Any]] = json.loads((STORED / "expected.json").read_text())
ENDED = [*sorted(upgrade_data.ENDED), "cancelled-waiting"]
OPEN = sorted(JOBS.keys() - {*ENDED})
"""Jobs that wait in the stored data, or whose worker is gone."""
OLD_FIELDS = {"generation", "text", "losses"}
"""Of records, before request and output had keys of their own."""
WITHIN_S = 60


@dataclass(frozen=True, slots=True)
class Upgraded:
    """The present stack, on a copy of the stored data."""

    port: int
    redis_url: str

    def endpoint(self, owner: str) -> Own:
        return Own(f"http://127.0.0.1:{self.port}", {"X-API-Key": upgrade_data.KEYS[owner]})

    def client(self, owner: str) -> Client:
        return Client(f"http://127.0.0.1:{self.port}", upgrade_data.KEYS[owner])

    def ended(self, name: str) -> dict[str, Any]:
        """A job, once it has ended."""
        job = JOBS[name]
        (found,) = job_load.ended(self.endpoint(job["owner"]), [job["id"]], WITHIN_S)
        return found

    def check_stream(self, name: str, text: str) -> None:
        """A job's whole stream gives this text, without gap or repetition, and one end."""
        job = JOBS[name]
        with self.client(job["owner"]) as client:
            events = list(client.events(job["id"]))
        chunks = [json.loads(event.data)["text"] for event in events if event.kind is EventKind.CHUNK]
        assert "".join(chunks) == text
        assert [event.n for event in events] == list(range(1, len(events) + 1))
        assert [event.kind for event in events].count(EventKind.DONE) == 1

    def redis(self) -> Redis:
        return connect(self.redis_url)


@pytest.fixture(scope="module")
def upgraded() -> Iterator[Upgraded]:
    checkout = Checkout()
    # Not pytest's folders: a socket's path may have hardly more than 100 characters.
    with tempfile.TemporaryDirectory(prefix="mlxq-", ignore_cleanup_errors=True) as folder:
        home, port = Path(folder), free_port()
        (home / "catalog.toml").write_text(upgrade_data.catalog(home))
        shutil.copytree(STORED / "valkey", home / "data/valkey")
        shutil.copy(STORED / "keys.json", home / "data/keys.json")
        env = checkout.environment(**upgrade_data.variables(home, port), FLOWER_PORT=str(free_port()))
        env |= {"ENV_FILE": os.devnull, "SLOTS": "4"}
        log = home / "log"
        with process(checkout.serve, log, env) as child:
            wait_until(lambda: " ready (BACKEND=fake" in log.read_text(), child, log)
            yield Upgraded(port, f"unix://{home}/data/run/valkey.sock")


def test_the_stored_data_has_jobs_of_every_kind() -> None:
    assert {JOBS[name]["status"] for name in ENDED} == {"succeeded", "failed", "cancelled"}
    assert {JOBS[name]["status"] for name in OPEN} == {"queued", "running"}
    for name in upgrade_data.CUT:
        assert 0 < len(JOBS[name]["said"]) < len(JOBS[name]["text"]), name
    assert upgrade_data.ALL.keys() == JOBS.keys()


@pytest.mark.parametrize("name", ENDED)
def test_ended_jobs_are_read_as_before(upgraded: Upgraded, name: str) -> None:
    stored, job = JOBS[name], upgraded.ended(name)
    assert (job["status"], job["attempt"]) == (stored["status"], stored["attempt"])
    assert ((job["output"] or {}).get("text") or "") == stored["said"]
    upgraded.check_stream(name, stored["said"])


@pytest.mark.parametrize("name", OPEN)
def test_jobs_that_waited_end_with_the_text_of_an_undisturbed_run(upgraded: Upgraded, name: str) -> None:
    stored, job = JOBS[name], upgraded.ended(name)
    assert (job["status"], job["error"], job["output"]["text"]) == ("succeeded", None, stored["text"])
    assert job["attempt"] == stored["attempt"] + 1
    upgraded.check_stream(name, stored["text"])


@pytest.mark.parametrize("name", upgrade_data.CUT)
def test_an_interrupted_job_continues(upgraded: Upgraded, name: str) -> None:
    job = upgraded.ended(name)
    assert job["attempt"] == 2
    assert [each["outcome"] for each in job["history"]] == ["worker_lost", "ended"]


def test_owners_find_their_jobs(upgraded: Upgraded) -> None:
    for owner in upgrade_data.KEYS:
        with upgraded.client(owner) as client:
            listed = client.request("GET", "/v1/jobs?limit=100").json()["data"]
        assert {each["id"] for each in listed} == {job["id"] for job in JOBS.values() if job["owner"] == owner}


@pytest.mark.parametrize("name", ["succeeded-twice-sent", "twice-sent"])
def test_a_request_that_is_repeated_after_the_upgrade_makes_no_second_job(upgraded: Upgraded, name: str) -> None:
    asked = upgrade_data.ALL[name]
    with upgraded.client(asked.owner) as client:
        again = client.submit(asked.body, idempotency_key=asked.idempotency_key)
    assert again.id == JOBS[name]["id"]


def test_no_keys_of_the_earlier_layout_are_left(upgraded: Upgraded) -> None:
    for name in JOBS:
        upgraded.ended(name)
    ours = tuple(value for name, value in vars(keys).items() if name.isupper() and isinstance(value, str))
    known = (*ours, "_kombu.binding", "LIMITS:")

    def strange(client: Redis) -> list[str]:
        found = (key.decode() if isinstance(key, bytes) else key for key in client.scan_iter(count=1000))
        return sorted(key for key in found if not key.startswith(known))

    with upgraded.redis() as client:  # maintenance looks again some seconds after an old worker's last job
        eventually(lambda: strange(client) == [], "no old key is left", 2 * ADOPT_AGAIN_S)


def test_no_fields_of_the_earlier_layout_are_left(upgraded: Upgraded) -> None:
    with upgraded.redis() as client:
        for name, job in JOBS.items():
            upgraded.ended(name)
            assert OLD_FIELDS.isdisjoint(client.hkeys(keys.JOB + job["id"])), name


def test_the_stored_data_has_the_earlier_layout() -> None:
    (stored,) = (STORED / "valkey").rglob("*.base.aof")
    words = set(stored.read_text(errors="replace").split())
    assert words >= OLD_FIELDS
    assert any(word.startswith(keys.OLD_QUEUE) for word in words)
