"""Durable acceptance: a script whose answer counts only when everything it wrote is on Redis's disk.

The proof is a second command in the same pipeline, so it costs no further round trip. Its latency depends on
`appendfsync`: one more turn of Redis's event loop with `always`, up to a second with `everysec`.
`scripts/bench --only durability` measures it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

from redis.exceptions import NoScriptError, ReadOnlyError, RedisError, ResponseError

from shared.errors import NotDurable
from shared.queue.redis import Redis, passes, source

PROOF_S: Final = 1.5
"""Longest wait for the proof: longer than the second of `everysec`, shorter than callers wait for an answer."""

_PROBE: Final = ("WAITAOF", 1, 0, 1)
_APPEND: Final = ("CONFIG GET", "append*")


@dataclass(frozen=True, slots=True)
class _Proof:
    """A command, and whether its answer says that what was written before it is on the disk."""

    command: tuple[str | int, ...]
    holds: Callable[[Any], bool]


_WAIT: Final = _Proof(("WAITAOF", 1, 0, round(PROOF_S * 1000)), lambda acks: bool(acks[0]))
# With this setting, Redis answers a command only after it has written it to the disk.
_ALWAYS: Final = _Proof(_APPEND, lambda conf: (conf["appendonly"], conf["appendfsync"]) == ("yes", "always"))


def why_unproven(client: Redis) -> str:
    """Why this Redis cannot prove that it keeps what it accepts; empty when it can.

    Raises:
        redis.RedisError: Redis is away, or follows another one now.
    """
    try:
        _find_proof(client)
    except NotDurable as error:
        return error.detail
    return ""


class ProvenScript:
    """The script `scripts/{name}.lua`, to be called with `args=[…]`; it must write something at each call."""

    def __init__(self, client: Redis, name: str) -> None:
        self._client = client
        self._script = client.register_script(source(name))
        self._proof: _Proof | None = None

    def __call__(self, args: Sequence[Any]) -> Any:
        """Run it.

        Raises:
            NotDurable: Redis cannot give a proof (then usually nothing was written), or gave none in time.
            redis.RedisError: Redis is away, or refuses.
        """
        proof = self._proof  # other threads may reset it
        if proof is None:  # found before the script runs: a request that is refused must leave no job behind
            proof = self._proof = _find_proof(self._client)
        answer, evidence = self._ask(args, proof)
        if isinstance(answer, NoScriptError):
            self._client.script_load(self._script.script)
            answer, evidence = self._ask(args, proof)
        if isinstance(answer, RedisError):
            raise answer
        if isinstance(evidence, RedisError) or not proof.holds(evidence):
            self._proof = None
            if isinstance(evidence, RedisError) and passes(evidence):
                raise evidence
            raise NotDurable("The queue did not prove in time that it keeps the job.", retry_after=1)
        return answer

    def _ask(self, args: Sequence[Any], proof: _Proof) -> tuple[Any, Any]:
        with self._client.pipeline(transaction=False) as pipe:
            pipe.evalsha(self._script.sha, 0, *args)
            pipe.execute_command(*proof.command)
            answer, evidence = pipe.execute(raise_on_error=False)
        return answer, evidence


def _find_proof(client: Redis) -> _Proof:
    """The proof that this Redis can give.

    Raises:
        NotDurable: none.
        redis.ReadOnlyError: it follows another one, and has none to give meanwhile.
    """
    try:
        client.execute_command(*_PROBE)
    except ResponseError as error:
        if passes(error):
            raise
        if "replica" in str(error):  # as a master that was replaced: clients find the new one soon
            raise ReadOnlyError(str(error)) from None
        if "appendonly" in str(error):
            raise _unable("Redis writes no append-only file (appendonly no)") from None
        if _ALWAYS.holds(_append_settings(client)):
            return _ALWAYS
        raise _unable("Redis has no WAITAOF (it is older than 7.2, or forbids it) and no appendfsync always") from None
    if _append_settings(client)["appendfsync"] == "no":
        raise _unable("Redis leaves it to the system when to write to the disk (appendfsync no)")
    return _WAIT


def _append_settings(client: Redis) -> dict[str, str]:
    """What Redis says of its append-only file; empty words where it does not say, as with managed servers."""
    found: dict[str, str] = {"appendonly": "", "appendfsync": ""}
    with suppress(ResponseError):
        found |= client.execute_command(*_APPEND)
    return found


def _unable(why: str) -> NotDurable:
    return NotDurable(f"Accepted jobs could be lost, so none is accepted: {why}.", retry_after=10)
