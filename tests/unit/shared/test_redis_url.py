"""Validation of REDIS_URL and BROKER_URL, and their conversion to kombu's format."""

from __future__ import annotations

import pytest
from kombu import Connection
from kombu.transport import get_transport_cls
from pydantic import ValidationError

from shared.queue import broker
from shared.queue.redis_url import InvalidUrl, Login, SentinelUrl, check_broker, check_store, parse_sentinel
from shared.settings import Settings, faults


@pytest.mark.parametrize(
    ("url", "parts"),
    [
        ("sentinel://s1?master=m", SentinelUrl((("s1", 26379),), "m")),
        ("sentinel://s1:1,s2,[::1]:3/4?master=m", SentinelUrl((("s1", 1), ("s2", 26379), ("::1", 3)), "m", 4)),
        ("sentinel://:p%40,w@h/?master=a%20b", SentinelUrl((("h", 26379),), "a b", login=Login(None, "p@,w"))),
        (
            "sentinel://u:p@h/0?master=m&sentinel_username=v&sentinel_password=q%26",
            SentinelUrl((("h", 26379),), "m", 0, Login("u", "p"), Login("v", "q&")),
        ),
    ],
)
def test_sentinel_url_is_parsed(url: str, parts: SentinelUrl) -> None:
    assert parse_sentinel(url) == parts
    assert check_store(url) == check_broker(url) == url


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("sentinel://h1:1,h2:2/0", "must name the master"),
        ("sentinel://h1/0?master=", "must name the master"),
        ("sentinel:///0?master=m", "must name the sentinels"),
        ("sentinel://h1,,h2?master=m", "must name the sentinels"),
        ("sentinel://h1:port?master=m", "port"),
        ("sentinel://h1:0?master=m", "port"),
        ("sentinel://h1:65536?master=m", "port"),
        ("sentinel://[::1?master=m", "must be a valid URL"),
        ("sentinel://h1/x?master=m", "database, not 'x'"),
        ("sentinel://h1/-1?master=m", "database, not '-1'"),
        ("sentinel://h1?master=m&passwort=hush", "unknown parameter 'passwort'"),
        ("redis://:hush@h:port/0", "port"),
        ("sentinels://h1?master=m", "must begin with redis://, rediss://, unix:// or sentinel://"),
        ("localhost:6379", "must begin with"),
    ],
)
def test_error_is_one_line_without_the_password(url: str, reason: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Settings(_env_file=None, redis_url=url)
    assert faults(caught.value).startswith("REDIS_URL: ") and reason in faults(caught.value)
    assert "\n" not in faults(caught.value)
    assert "hush" not in f"{caught.value}{faults(caught.value)}"


def test_broker_may_be_any_that_kombu_supports() -> None:
    for url in ("redis://h", "rediss://h:1/2", "unix:///s", "redis+socket:///s", "memory://", "amqp://h//"):
        assert check_broker(url) == url
    for url in ("broker", "sentinel://h", "redis://h:x"):
        with pytest.raises(InvalidUrl):
            check_broker(url)
    with pytest.raises(ValidationError) as caught:
        Settings(_env_file=None, broker_url="sentinel://h")
    assert faults(caught.value).startswith("BROKER_URL: must name the master")


def test_representation_hides_the_password() -> None:
    assert "hush" not in repr(parse_sentinel("sentinel://u:hush@h?master=m&sentinel_password=hush"))


@pytest.mark.parametrize(
    ("url", "converted"),
    [
        ("redis://h:1/2", "redis://h:1/2"),
        ("unix:///d/s", "redis+socket:///d/s"),
        ("sentinel://s1,s2:2/3?master=m", "sentinel://s1:26379/3"),
        ("sentinel://:p%40%3B@[::1]:7?master=m", "sentinel://:p%40%3B@[::1]:7/0"),
        ("sentinel://u:p@s1?master=m", "sentinel://u:p@s1:26379/0"),
    ],
)
def test_url_is_converted_to_kombus_format(url: str, converted: str) -> None:
    assert broker.kombu_url(url) == converted


def test_kombu_receives_every_sentinel_and_hides_the_password() -> None:
    url = "sentinel://u:hush@s1,s2:2/3?master=m&sentinel_username=v&sentinel_password=hush"
    options = broker.transport_options(url, timeout_s=4)
    assert options["sentinels"] == (("s1", 26379), ("s2", 2)) and options["master_name"] == "m"
    assert options["sentinel_kwargs"]["socket_timeout"] == 2  # asking both takes at most the time limit of a call
    assert options["sentinel_kwargs"]["credential_provider"].get_credentials() == ("v", "hush")
    connection = Connection(broker.kombu_url(url), transport_options=options)
    assert "hush" not in f"{options}{connection.as_uri()}"
    assert (connection.userid, connection.password, connection.virtual_host) == ("u", "hush", "3")
    assert get_transport_cls("sentinel") is broker.SentinelTransport


def test_plain_broker_receives_only_time_limits() -> None:
    limits = {"socket_timeout": 4, "socket_connect_timeout": 4, "health_check_interval": broker.HEALTH_CHECK_S}
    assert broker.transport_options("redis://h", timeout_s=4) == limits
