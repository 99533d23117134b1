"""The current stack on stored data of an earlier version."""

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
from shared.queue.maintenance import ADOPT_AGAIN_S
from shared.redis import keys
from shared.redis.client import Redis, connect
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
"""Jobs that are queued in the stored data, or whose worker was killed."""
OLD_FIELDS = {"generation", "text", "losses"}
"""Fields of records in the first layout."""
WITHIN_S = 60


@dataclass(frozen=True, slots=True)
class Upgraded:
    """The current stack on a copy of the stored data."""

    port: int
    redis_url: str

    def endpoint(self, owner: str) -> Own:
        return Own(f"http://127.0.0.1:{self.port}", {"X-API-Key": upgrade_data.KEYS[owner]})

    def client(self, owner: str) -> Client:
        return Client(f"http://127.0.0.1:{self.port}", upgrade_data.KEYS[owner])

    def ended(self, name: str) -> dict[str, Any]:
        """Wait for the end of a job and return it."""
        stored = JOBS[name]
        (job,) = job_load.ended(self.endpoint(stored["owner"]), [stored["id"]], WITHIN_S)
        return job

    def check_stream(self, name: str, text: str) -> None:
        """Check that a job's stream has this text, no gaps or duplicates, and one end."""
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
    # The path of a Unix socket is limited to about 100 characters, so pytest's folders are too deep.
    with tempfile.TemporaryDirectory(prefix="mlxq-", ignore_cleanup_errors=True) as folder:
        home, port = Path(folder), free_port()
        (home / "catalog.toml").write_text(upgrade_data.catalog(home))
        shutil.copytree(STORED / "valkey", home / "data/valkey")
        shutil.copy(STORED / "keys.json", home / "data/keys.json")
        env = checkout.environment(**upgrade_data.variables(home, port), FLOWER_PORT=str(free_port()))
        env |= {"ENV_FILE": os.devnull, "FLOWER_PASSWORD": "secret", "SLOTS": "4"}
        log = home / "log"
        with process(checkout.serve, log, env) as child:
            wait_until(lambda: " ready (BACKEND=fake" in log.read_text(), child, log)
            yield Upgraded(port, f"unix://{home}/data/run/valkey.sock")


def test_stored_data_has_jobs_in_every_state() -> None:
    assert {JOBS[name]["status"] for name in ENDED} == {"succeeded", "failed", "cancelled"}
    assert {JOBS[name]["status"] for name in OPEN} == {"queued", "running"}
    for name in upgrade_data.CUT:
        assert 0 < len(JOBS[name]["partial_text"]) < len(JOBS[name]["text"]), name
    assert upgrade_data.ALL.keys() == JOBS.keys()


@pytest.mark.parametrize("name", ENDED)
def test_ended_jobs_are_unchanged(upgraded: Upgraded, name: str) -> None:
    stored, job = JOBS[name], upgraded.ended(name)
    assert (job["status"], job["attempt"]) == (stored["status"], stored["attempt"])
    assert ((job["output"] or {}).get("text") or "") == stored["partial_text"]
    upgraded.check_stream(name, stored["partial_text"])


@pytest.mark.parametrize("name", OPEN)
def test_open_jobs_end_with_the_text_of_an_uninterrupted_run(upgraded: Upgraded, name: str) -> None:
    stored, job = JOBS[name], upgraded.ended(name)
    assert (job["status"], job["error"], job["output"]["text"]) == ("succeeded", None, stored["text"])
    assert job["attempt"] == stored["attempt"] + 1
    upgraded.check_stream(name, stored["text"])


@pytest.mark.parametrize("name", upgrade_data.CUT)
def test_interrupted_job_is_resumed(upgraded: Upgraded, name: str) -> None:
    job = upgraded.ended(name)
    assert job["attempt"] == 2
    assert [each["outcome"] for each in job["history"]] == ["worker_lost", "ended"]


def test_owners_find_their_jobs(upgraded: Upgraded) -> None:
    for owner in upgrade_data.KEYS:
        with upgraded.client(owner) as client:
            listed = client.request("GET", "/v1/jobs?limit=100").json()["data"]
        assert {each["id"] for each in listed} == {job["id"] for job in JOBS.values() if job["owner"] == owner}


@pytest.mark.parametrize("name", ["succeeded-twice-sent", "twice-sent"])
def test_request_that_is_repeated_after_the_upgrade_creates_no_second_job(upgraded: Upgraded, name: str) -> None:
    request = upgrade_data.ALL[name]
    with upgraded.client(request.owner) as client:
        again = client.submit(request.body, idempotency_key=request.idempotency_key)
    assert again.id == JOBS[name]["id"]


def test_no_keys_of_the_first_layout_remain(upgraded: Upgraded) -> None:
    for name in JOBS:
        upgraded.ended(name)
    current = tuple(value for name, value in vars(keys).items() if name.isupper() and isinstance(value, str))
    known = (*current, "_kombu.binding", "LIMITS:")

    def unknown_keys(client: Redis) -> list[str]:
        names = (key.decode() if isinstance(key, bytes) else key for key in client.scan_iter(count=1000))
        return sorted(name for name in names if not name.startswith(known))

    with upgraded.redis() as client:  # maintenance deletes old keys some seconds after the last old job has ended
        eventually(lambda: unknown_keys(client) == [], "no old key remains", 2 * ADOPT_AGAIN_S)


def test_no_fields_of_the_first_layout_remain(upgraded: Upgraded) -> None:
    with upgraded.redis() as client:
        for name, job in JOBS.items():
            upgraded.ended(name)
            assert OLD_FIELDS.isdisjoint(client.hkeys(keys.JOB + job["id"])), name


def test_stored_data_has_the_first_layout() -> None:
    (stored,) = (STORED / "valkey").rglob("*.base.aof")
    words = set(stored.read_text(errors="replace").split())
    assert words >= OLD_FIELDS
    assert any(word.startswith(keys.OLD_QUEUE) for word in words)
