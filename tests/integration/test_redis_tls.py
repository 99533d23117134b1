"""TLS to Redis and its sentinels: every client verifies the certificate before it sends a password."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
import redis
from flask import Flask
from kombu.exceptions import OperationalError

from scripts.stack import preflight
from scripts.stack.failure import StartFailed
from scripts.stack.flower import RedisQueues
from scripts.stack.ports import free_port
from shared.jobs.record import Status
from shared.queue.wakeups import make_app
from shared.redis.client import connect
from shared.settings import Settings
from tests.plugins.stack import fake_stack_on
from tests.support.servers import Server
from tests.support.tls import Authority, TlsProxy
from tests.support.waiting import eventually
from web.access import rate_limits
from web.streaming.hub import Hub, Signal

PASSWORD = "hushword"
MASTER = "jobs"
FLOWER_PASSWORD = "hush"


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="mlxq-", ignore_cleanup_errors=True) as name:
        yield Path(name)


@pytest.fixture(scope="module")
def authority(folder: Path) -> Authority:
    return Authority.create(folder / "ca")


@pytest.fixture(scope="module")
def unknown(folder: Path) -> Authority:
    """A CA that signed no certificate of the servers."""
    return Authority.create(folder / "unknown")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with closing(Server(folder / "redis", PASSWORD, "appendonly yes", "appendfsync always")) as server:
        yield server


@pytest.fixture
def proxy(server: Server, authority: Authority) -> Iterator[TlsProxy]:
    with closing(TlsProxy(server.port, authority.cert_file, authority.key_file)) as proxy:
        yield proxy


@pytest.fixture
def sentinel(tmp_path: Path, server: Server, authority: Authority) -> Iterator[tuple[TlsProxy, TlsProxy]]:
    """TLS proxies of a sentinel and of its master. The sentinel itself monitors without TLS."""
    with closing(TlsProxy(server.port, authority.cert_file, authority.key_file)) as master:
        watch = (
            f"sentinel monitor {MASTER} 127.0.0.1 {master.port} 1",
            f'sentinel auth-pass {MASTER} "{PASSWORD}"',
        )
        with (
            closing(Server(tmp_path / "sentinel", PASSWORD, *watch, sentinel=True)) as process,
            closing(TlsProxy(process.port, authority.cert_file, authority.key_file)) as proxy,
        ):
            yield proxy, master


def settings_for(url: str, authority: Authority, **values: Any) -> Settings:
    return Settings(_env_file=None, redis_url=url, redis_ca_file=authority.ca_file, durable=False, **values)


def command(settings: Settings) -> object:
    with connect(settings.store_url, timeout_s=2, retries=0) as client:
        return client.ping()


def pubsub(settings: Settings) -> object:
    hub = Hub(connect(settings.store_url, timeout_s=2, retries=0, protocol=2))
    with hub.subscribe("job") as subscription:
        assert subscription.take(2.0) == [Signal.RESYNC]
    return hub


def limiter(settings: Settings) -> object:
    storage = rate_limits.register(Flask("test"), settings, lambda _response, _quotas: None).storage
    assert storage.get("key") == 0
    return storage


def celery(settings: Settings) -> object:
    with make_app(settings, hasty=True).connection_for_write() as connection:
        return connection.default_channel.client.ping()


def celery_consumer(settings: Settings) -> object:
    with make_app(settings).connection_for_read(connect_timeout=2) as connection:
        connection.default_channel.queue_declare("mlxq.wakeups.test")
        return connection.default_channel


def flower(settings: Settings) -> object:
    return asyncio.run(RedisQueues(settings.celery_url).queues(["queue"]))


CLIENTS = [command, pubsub, limiter, celery, celery_consumer, flower]
REFUSED = (redis.ConnectionError, redis.TimeoutError, OperationalError, OSError, AssertionError)


@contextmanager
def refused(*proxies: TlsProxy) -> Iterator[None]:
    """Check that the block fails, and that no proxy receives anything from a client."""
    for proxy in proxies:
        proxy.received.clear()
        proxy.handshakes_failed = 0
    with pytest.raises(REFUSED):
        yield
    eventually(lambda: any(proxy.handshakes_failed for proxy in proxies), "the client rejects the certificate")
    assert not any(proxy.received for proxy in proxies)


@pytest.mark.parametrize("client", CLIENTS)
def test_every_client_verifies_the_certificate(
    client: Callable[[Settings], object], server: Server, proxy: TlsProxy, authority: Authority, unknown: Authority
) -> None:
    url = f"rediss://:{PASSWORD}@127.0.0.1:{proxy.port}/0"
    with refused(proxy):
        client(settings_for(url, unknown))
    with refused(proxy):
        client(Settings(_env_file=None, redis_url=url))  # the system's CAs
    with closing(TlsProxy(server.port, authority.other_host_file)) as other, refused(other):
        client(settings_for(f"rediss://:{PASSWORD}@127.0.0.1:{other.port}/0", authority))
    assert client(settings_for(url, authority)) is not None
    assert PASSWORD.encode() in proxy.received and not proxy.plain


@pytest.mark.parametrize("client", CLIENTS)
def test_every_client_verifies_sentinel_and_master(
    client: Callable[[Settings], object],
    sentinel: tuple[TlsProxy, TlsProxy],
    authority: Authority,
    unknown: Authority,
) -> None:
    url = f"sentinel://:{PASSWORD}@127.0.0.1:{sentinel[0].port}/0?master={MASTER}&tls=true&sentinel_password={PASSWORD}"
    with refused(*sentinel):
        client(settings_for(url, unknown))
    assert client(settings_for(url, authority)) is not None
    assert all(PASSWORD.encode() in proxy.received for proxy in sentinel) and not sentinel[0].plain


@pytest.mark.parametrize("client", CLIENTS)
def test_every_client_presents_its_certificate(
    client: Callable[[Settings], object], server: Server, authority: Authority
) -> None:
    proxy = TlsProxy(server.port, authority.cert_file, authority.key_file, client_ca=authority.ca_file)
    url = f"rediss://:{PASSWORD}@127.0.0.1:{proxy.port}/0"
    with closing(proxy):
        with refused(proxy):
            client(settings_for(url, authority))
        files = {"redis_cert_file": authority.cert_file, "redis_key_file": authority.key_file}
        assert client(settings_for(url, authority, **files)) is not None


def test_broker_of_its_own_is_verified_with_the_same_ca(
    server: Server, proxy: TlsProxy, authority: Authority, unknown: Authority
) -> None:
    url = f"rediss://:{PASSWORD}@127.0.0.1:{proxy.port}/1"
    plain = f"redis://:{PASSWORD}@127.0.0.1:{server.port}/0"
    with pytest.raises(StartFailed, match="BROKER_URL cannot be reached"):
        preflight.check_broker(settings_for(plain, unknown, broker_url=url))
    assert not proxy.received
    preflight.check_broker(settings_for(plain, authority, broker_url=url))


def test_stack_runs_over_tls(proxy: TlsProxy, authority: Authority) -> None:
    variables = {
        "REDIS_CA_FILE": str(authority.ca_file),
        "FLOWER_PORT": str(free_port()),
        "FLOWER_PASSWORD": FLOWER_PASSWORD,
    }
    with (
        fake_stack_on(f"rediss://:{PASSWORD}@127.0.0.1:{proxy.port}/2", **variables) as stack,
        stack.client() as client,
    ):
        stack.start_worker()
        stack.start_flower()
        job = client.submit({"prompt": "hi", "max_tokens": 3})
        assert next(iter(client.events(job.id))).n == 1
        assert client.job(job.id, wait_s=30).status is Status.SUCCEEDED
        eventually(lambda: client.request("GET", "/health").json()["status"] == "ok", "the service is healthy")
        node = stack.registry.workers()[0].node
        for page in ("/broker", f"/worker/{node}"):
            html = eventually(lambda: _page(stack.flower_url, page), f"Flower shows {page}")  # noqa: B023
            assert PASSWORD not in html
        assert not any(PASSWORD in stack.log(name) for name in ("web", "worker-0", "flower"))
    assert not proxy.plain


def _page(url: str, page: str) -> str:
    """Return a page of Flower; an empty string until Flower knows the worker."""
    response = httpx2.get(f"{url}{page}?refresh=1", auth=("admin", FLOWER_PASSWORD), timeout=30)
    return response.text if response.is_success else ""
