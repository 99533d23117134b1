"""Durable acceptance: a script call that succeeds only when Redis confirms that its writes are on disk.

The confirmation is a second command in the same pipeline, so it needs no further round trip. Its latency depends on
`appendfsync`: one iteration of Redis's event loop with `always`, up to one second with `everysec`.
`scripts/bench --only durability` measures it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

from redis.exceptions import NoPermissionError, NoScriptError, ReadOnlyError, RedisError, ResponseError

from shared.errors import NotDurable
from shared.redis.client import Redis, passes, source

PROOF_S: Final = 1.5
"""Maximum wait for the confirmation. Above the one second of `everysec`, and below the timeouts of API clients."""

_PROBE: Final = ("WAITAOF", 1, 0, 1)
_APPEND: Final = ("CONFIG GET", "append*")


@dataclass(frozen=True, slots=True)
class _Proof:
    """A command whose reply confirms that earlier writes of the connection are on disk.

    Attributes:
        holds: whether a reply is such a confirmation.
    """

    command: tuple[str | int, ...]
    holds: Callable[[Any], bool]


_WAIT: Final = _Proof(("WAITAOF", 1, 0, round(PROOF_S * 1000)), lambda acks: bool(acks[0]))
# With `appendfsync always`, Redis replies to a command only after it has written it to disk.
_ALWAYS: Final = _Proof(_APPEND, lambda conf: (conf["appendonly"], conf["appendfsync"]) == ("yes", "always"))


def why_unproven(client: Redis) -> str:
    """Return why this Redis cannot confirm that accepted jobs are on disk; an empty string if it can.

    Raises:
        redis.RedisError: Redis is unreachable or has become a replica.
    """
    try:
        _find_proof(client)
    except NotDurable as error:
        return error.detail
    return ""


class ProvenScript:
    """The script `scripts/{name}.lua` with a durability check. It must write something in each call."""

    def __init__(self, client: Redis, name: str) -> None:
        self._client = client
        self._script = client.register_script(source(name))
        self._proof: _Proof | None = None

    def __call__(self, args: Sequence[Any]) -> Any:
        """Run the script and return its reply.

        Raises:
            NotDurable: Redis cannot confirm its writes (then usually nothing was written), or did not in time.
            redis.RedisError: Redis is unreachable or rejected the call.
        """
        proof = self._proof  # other threads may reset it
        if proof is None:  # checked before the script runs, so that a rejected request leaves no job behind
            proof = self._proof = _find_proof(self._client)
        reply, evidence = self._call(args, proof)
        if isinstance(reply, NoScriptError):
            self._client.script_load(self._script.script)
            reply, evidence = self._call(args, proof)
        if isinstance(reply, RedisError):
            raise reply
        if isinstance(evidence, RedisError) or not proof.holds(evidence):
            self._proof = None
            if isinstance(evidence, RedisError) and passes(evidence):
                raise evidence
            raise NotDurable(
                "Redis did not confirm in time that the job is on disk. Retry with the same Idempotency-Key.",
                retry_after=1,
            )
        return reply

    def _call(self, args: Sequence[Any], proof: _Proof) -> tuple[Any, Any]:
        with self._client.pipeline(transaction=False) as pipe:
            pipe.evalsha(self._script.sha, 0, *args)
            pipe.execute_command(*proof.command)
            reply, evidence = pipe.execute(raise_on_error=False)
        return reply, evidence


def _find_proof(client: Redis) -> _Proof:
    """Return the kind of confirmation that this Redis supports.

    Raises:
        NotDurable: it supports none.
        redis.ReadOnlyError: it is a replica now.
    """
    try:
        client.execute_command(*_PROBE)
    except ResponseError as error:
        if passes(error):
            raise
        if "replica" in str(error):  # a failover is under way; clients find the new master soon
            raise ReadOnlyError(str(error)) from None
        if "appendonly" in str(error):
            raise _unable("the append-only file is off; set appendonly yes") from None
        if _ALWAYS.holds(_append_settings(client)):
            return _ALWAYS
        if isinstance(error, NoPermissionError):
            raise _unable("the Redis user may not run WAITAOF; add +waitaof to its ACL rule") from None
        raise _unable("WAITAOF is not available; use Redis 7.2 or later, or set appendfsync always") from None
    if _append_settings(client)["appendfsync"] == "no":
        raise _unable("appendfsync is no; set appendfsync everysec or always")
    return _WAIT


def _append_settings(client: Redis) -> dict[str, str]:
    """Return Redis's settings for the append-only file; empty strings if it hides them, as managed servers do."""
    settings: dict[str, str] = {"appendonly": "", "appendfsync": ""}
    with suppress(ResponseError):
        settings |= client.execute_command(*_APPEND)
    return settings


def _unable(reason: str) -> NotDurable:
    return NotDurable(f"Redis cannot confirm that jobs are on disk, so no job is accepted: {reason}.", retry_after=10)
