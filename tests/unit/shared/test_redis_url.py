"""Validation of REDIS_URL and BROKER_URL, and their conversion to kombu's format."""

from __future__ import annotations

import pytest
from kombu import Connection
from kombu.transport import get_transport_cls
from kombu.utils.json import dumps
from pydantic import ValidationError

from shared.load_settings import faults
from shared.queue import broker
from shared.redis.client import connect
from shared.redis.urls import (
    InvalidUrl,
    Login,
    RedisUrl,
    SentinelUrl,
    ServerUrl,
    Tls,
    check_broker,
    check_store,
    parse,
)
from shared.settings import Settings


@pytest.mark.parametrize(
    ("url", "parsed"),
    [
        ("redis://", ServerUrl("localhost")),
        ("redis://h:1/2", ServerUrl("h", 1, db=2)),
        ("redis://u:p%40@[::1]", ServerUrl("::1", login=Login("u", "p@"))),
        ("redis://h?db=3&username=u&password=p%26", ServerUrl("h", db=3, login=Login("u", "p&"))),
        ("rediss://:p@h", ServerUrl("h", login=Login(None, "p"), tls=Tls())),
        ("rediss://h/1?ssl_cert_reqs=required", ServerUrl("h", db=1, tls=Tls())),
        ("rediss://h?ssl_ca_certs=/c&ssl_certfile=/d&ssl_keyfile=/e", ServerUrl("h", tls=Tls("/c", "/d", "/e"))),
        ("unix:///d/s%20t", ServerUrl(path="/d/s t")),
        ("unix://u:p@/d/s?db=4", ServerUrl(path="/d/s", db=4, login=Login("u", "p"))),
        ("unix:///d/s?password=p", ServerUrl(path="/d/s", login=Login(None, "p"))),
        ("sentinel://s1?master=m", SentinelUrl((("s1", 26379),), "m")),
        ("sentinel://s1:1,s2,[::1]:3/4?master=m", SentinelUrl((("s1", 1), ("s2", 26379), ("::1", 3)), "m", 4)),
        ("sentinel://:p%40,w@h/?master=a%20b", SentinelUrl((("h", 26379),), "a b", login=Login(None, "p@,w"))),
        (
            "sentinel://u:p@h/0?master=m&sentinel_username=v&sentinel_password=q%26",
            SentinelUrl((("h", 26379),), "m", 0, Login("u", "p"), Login("v", "q&")),
        ),
        ("sentinel://h?master=m&tls=true&ssl_ca_certs=/c", SentinelUrl((("h", 26379),), "m", tls=Tls("/c"))),
    ],
)
def test_url_is_parsed(url: str, parsed: RedisUrl) -> None:
    assert parse(url) == parsed
    assert check_store(url) == check_broker(url) == url


SECRET = "hushword"
INVALID = [
    ("sentinel://:{}@h1:1,h2:2/0", "must name the master"),
    ("sentinel://:{}@h1/0?master=", "must name the master"),
    ("sentinel://:{}@/0?master=m", "must name the sentinels"),
    ("sentinel://:{}@h1,,h2?master=m", "must name the sentinels"),
    ("sentinel://:{}@h1:port?master=m", "port"),
    ("sentinel://:{}@h1:0?master=m", "port"),
    ("sentinel://:{}@h1:65536?master=m", "port"),
    ("sentinel://:{}@[::1?master=m", "must be a valid URL"),
    ("sentinel://:{}@h1/x?master=m", "number of a database"),
    ("sentinel://:{}@h1/-1?master=m", "number of a database"),
    ("sentinel://h1?master=m&passwort={}", "unknown parameter"),
    ("sentinel://h1?master=m&sentinel_password=a&{}=1", "unknown parameter"),
    ("sentinel://:{}@h1?master=m&tls=yes", "tls=true"),
    ("sentinel://:{}@h1?master=m&ssl_ca_certs=/c", "add tls=true"),
    ("sentinels://:{}@h1?master=m", "must begin with redis://, rediss://, unix:// or sentinel://"),
    ("redis://:{}@h:port/0", "port"),
    ("redis://:{}@h:0", "port"),
    ("redis://:a/{}@h/0", "percent-encode special characters"),
    ("redis://:1/{}@h/0", "percent-encode special characters"),
    ("redis://:a#{}@h/0", "percent-encode special characters"),
    ("redis://:a?{}=b@h/0", "unknown parameter"),
    ("redis://:[{}@h/0", "must be a valid URL"),
    ("redis://:{}\u2100@h/0", "must be a valid URL"),
    ("redis://:{}@h/x", "number of a database"),
    ("redis://:{}@h?socket_timeout=1", "unknown parameter"),
    ("rediss://:{}@h?ssl_cert_reqs=none", "must not turn off the verification"),
    ("rediss://:{}@h?ssl_check_hostname=false", "unknown parameter"),
    ("rediss://:{}@h?ssl_keyfile=/k", "add ssl_certfile"),
    ("unix://:{}@", "path of a socket"),
    ("{}:6379", "must begin with"),
]


@pytest.mark.parametrize(("url", "reason"), INVALID)
def test_error_is_one_line_without_the_password(url: str, reason: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Settings(_env_file=None, redis_url=url.format(SECRET))
    assert faults(caught.value).startswith("REDIS_URL: ") and reason in faults(caught.value)
    assert "\n" not in faults(caught.value)
    assert SECRET not in f"{caught.value}{faults(caught.value)}"


def test_broker_may_be_any_that_kombu_supports() -> None:
    for url in ("redis://h", "rediss://h:1/2", "unix:///s", "redis+socket:///s", "memory://", "amqp://h//"):
        assert check_broker(url) == url
    for url in ("broker", "sentinel://h", "redis://h:x"):
        with pytest.raises(InvalidUrl):
            check_broker(url)
    with pytest.raises(ValidationError) as caught:
        Settings(_env_file=None, broker_url="sentinel://h")
    assert faults(caught.value).startswith("BROKER_URL: must name the master")


FORMS = [
    "redis://:{}@h:1/2",
    "redis://u:{}@h:1/2",
    "redis://h:1/2?password={}",
    "redis://h:1?username=u&password={}&db=2",
    "rediss://u:{}@h/2",
    "rediss://h/2?password={}",
    "unix://u:{}@/d/s?db=2",
    "unix:///d/s?username=u&password={}&db=2",
    "redis+socket://u:{}@/d/s?virtual_host=2",
    "redis+socket:///d/s?virtual_host=2&password={}",
    "sentinel://u:{}@h,i:3/2?master=m&sentinel_password={}",
    "sentinel://h/2?master=m&password={}&tls=true",
]
"""Every form of a URL with a password."""


@pytest.mark.parametrize("form", FORMS)
def test_password_reaches_redis_but_no_page_and_no_log(form: str) -> None:
    url = form.format(SECRET, SECRET)
    parsed = parse(url)
    assert parsed.login.password == SECRET and parsed.db == 2
    options = broker.transport_options(url, timeout_s=4)
    connection = Connection(broker.kombu_url(url), transport_options=options, ssl=broker.tls_options(url))
    worker_statistics = dumps(connection.info())  # Flower shows these
    shown = f"{parsed!r}{options}{connection!r}{connection.as_uri()}{connection.as_uri(include_password=True)}"
    assert SECRET not in shown + worker_statistics + broker.kombu_url(url)
    transport = get_transport_cls(connection.transport_cls)(connection)
    channel = transport.Channel.__new__(transport.Channel)  # without connecting
    channel.connection, channel.credentials = transport, options["credentials"]
    parameters = channel._connparams()
    assert parameters["credential_provider"].get_credentials()[-1] == SECRET and parameters["db"] == 2
    if parsed.tls is not None:
        assert (parameters["ssl_cert_reqs"], parameters["ssl_check_hostname"]) == ("required", True)
    pool = connect(url).connection_pool
    assert SECRET not in repr(pool)


@pytest.mark.parametrize(
    ("url", "converted"),
    [
        ("redis://h:1/2", "redis://h:1/2"),
        ("unix:///d/s", "redis+socket:///d/s"),
        ("sentinel://s1,s2:2/3?master=m", "sentinel://s1:26379/3"),
        ("redis://u:p@h", "redis://h:6379/0"),
        ("rediss://[::1]", "rediss://[::1]:6379/0"),
        ("unix:///d/s%20t?db=3", "redis+socket:///d/s%20t?virtual_host=3"),
        ("amqp://u:p@h//", "amqp://u:p@h//"),
        ("sentinel://:p%40%3B@[::1]:7?master=m", "sentinel://[::1]:7/0"),
        ("sentinel://u:p@s1?master=m", "sentinel://s1:26379/0"),
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
    assert options["credentials"].get_credentials() == ("u", "hush") and connection.virtual_host == "3"
    assert get_transport_cls("sentinel") is broker.SentinelTransport
    assert get_transport_cls("redis") is get_transport_cls("rediss") is broker.RedisTransport


def test_plain_broker_receives_only_time_limits() -> None:
    limits = {"socket_timeout": 4, "socket_connect_timeout": 4, "health_check_interval": broker.HEALTH_CHECK_S}
    assert broker.transport_options("redis://h", timeout_s=4) == limits
