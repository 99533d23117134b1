"""A purged API key and a deleted job leave nothing behind, with real processes, some of which are not running."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx2
import pytest

pytest.importorskip("mlx_lm")

from shared.jobs.search import JobFilter
from shared.redis import keys
from shared.settings import ROOT
from tests.plugins.stack import Stack
from tests.support.waiting import eventually
from web.access.api_keys import KeyStore
from web.archive.database import Archive

SYSTEM = "You answer in few words and name your sources, whatever you are asked. " * 50
LINE = '{"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "M", "messages": []}}\n'


class User:
    """A client with an API key of its own."""

    def __init__(self, stack: Stack, name: str) -> None:
        store = KeyStore(stack.settings.keys_file)
        key = store.create(name, {"infer"})
        self.id, self.stack = key.split("_")[1], stack
        self.http = httpx2.Client(base_url=stack.url, headers={"X-API-Key": key}, timeout=60)

    def call(self, method: str, path: str, **options: Any) -> Any:
        answer = self.http.request(method, path, **options)
        assert answer.is_success, answer.text
        return answer.json() if answer.content else None

    def run_job(self) -> str:
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": f"I am {self.id}."}]
        job = self.call("POST", "/v1/jobs", json={"messages": messages, "max_tokens": 4}, headers={"Prefer": "wait=60"})
        assert job["status"] == "succeeded"
        return str(job["id"])

    def use_everything(self) -> None:
        """Run a job, store a response, and begin a batch that no worker will run."""
        self.run_job()
        self.call("POST", "/v1/responses", json={"model": self.stack.model, "input": "hi", "max_output_tokens": 16})
        line = LINE.replace('"M"', f'"{self.stack.model}"').encode()
        file = self.call("POST", "/v1/files", data={"purpose": "batch"}, files={"file": ("in.jsonl", line)})
        body = {"input_file_id": file["id"], "endpoint": "/v1/chat/completions", "completion_window": "24h"}
        self.call("POST", "/v1/batches", json=body)

    def prefixes(self) -> list[Path]:
        return [*self.stack.settings.prefixes_dir.glob(f"*/{self.id}_*")]

    def folders(self) -> list[Path]:
        roots = (self.stack.settings.files_path, self.stack.settings.responses_path)
        return [root / self.id for root in roots if (root / self.id).exists()]

    def keys_in_redis(self) -> list[str]:
        jobs = self.stack.redis.zrange(keys.OWNER + self.id, 0, -1)
        names = [keys.JOB + job for job in jobs if not self.stack.redis.hexists(keys.JOB + job, "deleted")]
        return names + self.stack.redis.zrange(keys.BATCHES + self.id, 0, -1)

    def archived(self, archive: Archive) -> int:
        return len(archive.page([self.id], JobFilter(), 100, None).jobs)


def purge(stack: Stack, name: str) -> None:
    command = [sys.executable, "-m", "scripts.stack.keys", "revoke", "--purge", name]
    subprocess.run(command, cwd=ROOT, env={**os.environ, **stack.env}, check=True)


def test_a_purged_key_leaves_nothing_and_others_keep_everything(tiny_stack: Stack) -> None:
    stack = tiny_stack
    archive = Archive(stack.home / "data/archive.sqlite3")
    background, worker = stack.start_background(), stack.start_worker()
    leaving, staying = User(stack, "leaving"), User(stack, "staying")
    for user in (leaving, staying):
        user.use_everything()
        eventually(lambda: user.archived(archive) == 2, "both jobs are archived")  # noqa: B023
    assert stack.stop(worker) == 0
    assert all(user.prefixes() and len(user.folders()) == 2 and user.keys_in_redis() for user in (leaving, staying))

    purge(stack, "leaving")
    eventually(lambda: not leaving.keys_in_redis() and not leaving.folders(), "Redis and the disk have nothing", 30)
    eventually(lambda: leaving.archived(archive) == 0, "the archive has nothing")
    assert leaving.prefixes(), "the worker is not running"
    assert leaving.http.get("/v1/jobs").status_code == 401
    assert staying.archived(archive) == 2 and staying.keys_in_redis() and len(staying.folders()) == 2

    stack.start_worker()
    assert not leaving.prefixes() and staying.prefixes()
    job = staying.run_job()
    eventually(lambda: staying.archived(archive) == 3, "the third job is archived")
    staying.call("DELETE", f"/v1/jobs/{job}")
    assert staying.http.get(f"/v1/jobs/{job}").status_code == 404
    eventually(lambda: staying.archived(archive) == 2, "the deleted job is erased")

    purge(stack, "staying")
    eventually(lambda: not staying.prefixes(), "a running worker erases the prefixes", 30)
    eventually(
        lambda: sum(each.stats.get("prefix_cache_entries", 0) for each in stack.ready_workers()) == 0,
        "and those in memory",
        30,
    )
    assert stack.stop(background) == 0
    archive.close()
    for user in (leaving, staying):
        user.http.close()
