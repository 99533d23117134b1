"""What an error of Redis means: wait, or a fault of ours."""

from __future__ import annotations

import pytest
from redis import ConnectionError as RedisAway
from redis import DataError, RedisError, ResponseError
from redis import TimeoutError as NoAnswer

from shared.store import Redis, passes


@pytest.mark.parametrize(
    ("error", "passing"),
    [
        (RedisAway("refused"), True),
        (NoAnswer("no answer"), True),
        (ResponseError("BUSY Redis is busy running a script."), True),
        (ResponseError("MISCONF Errors writing to the AOF file"), True),
        (ResponseError("BUSYGROUP Consumer Group name already exists"), False),
        (ResponseError("WRONGTYPE Operation against a key holding the wrong kind of value"), False),
        (DataError("Invalid input of type: 'NoneType'"), False),
    ],
)
def test_only_what_time_heals_passes(error: RedisError, passing: bool) -> None:
    assert passes(error) is passing


def test_a_script_that_raises_does_not_pass(client: Redis) -> None:
    with pytest.raises(ResponseError) as caught:
        client.eval("local job = nil; return job.status", 0)
    assert not passes(caught.value)


@pytest.mark.parametrize(
    ("setting", "refusing", "usual"),
    [("maxmemory", "1", "0"), ("min-replicas-to-write", "1", "0")],
)
def test_a_server_that_takes_no_writes_now_will_later(
    valkey_client: Redis, setting: str, refusing: str, usual: str
) -> None:
    valkey_client.config_set(setting, refusing)
    try:
        for write in (
            lambda: valkey_client.set("key", "value"),
            lambda: valkey_client.eval("return redis.call('SET', 'key', 'value')", 0),
        ):
            with pytest.raises(RedisError) as caught:
                write()
            assert passes(caught.value)
    finally:
        valkey_client.config_set(setting, usual)
