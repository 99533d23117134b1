"""What API keys have used, by day and model, and how much of their limits is in use.

Jobs are counted by the script that ends them, so each one counts once, however often it was tried. Jobs that a worker
of an earlier version ends are not counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, date, datetime, timedelta
from itertools import islice
from typing import Final, Self

from shared.redis import keys
from shared.redis.client import Redis

DAYS_KEPT: Final = 400
"""How long `lib/usage.lua` keeps the usage of a day."""
_EPOCH: Final = date(1970, 1, 1)
_PER_CALL: Final = 500


@dataclass(frozen=True, slots=True)
class Counters:
    """Numbers of jobs by their end, and of their tokens, in the order of `lib/usage.lua`.

    Attributes:
        prompt: tokens of prompts; the further choices of a request do not count its prompt again.
        cached: those of them that the prefix cache supplied.
        reasoning: completion tokens of reasoning.
    """

    succeeded: int = 0
    failed: int = 0
    cancelled: int = 0
    expired: int = 0
    prompt: int = 0
    cached: int = 0
    completion: int = 0
    reasoning: int = 0

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Parse the counters of a day, also those of another version."""
        return cls(*map(int, text.split()[: len(fields(cls))]))

    def to_text(self) -> str:
        """Return the counters in the form that `from_text` parses."""
        return " ".join(str(getattr(self, each.name)) for each in fields(self))

    def __add__(self, other: Counters) -> Counters:
        """Return the sum of both."""
        names = [each.name for each in fields(self)]
        return Counters(*(getattr(self, name) + getattr(other, name) for name in names))

    @property
    def jobs(self) -> int:
        """Number of jobs that have ended."""
        return self.succeeded + self.failed + self.cancelled + self.expired

    @property
    def tokens(self) -> int:
        """The tokens that limits count."""
        return self.prompt + self.completion


@dataclass(frozen=True, slots=True)
class UsageRow:
    """What an API key used of a model on a day (UTC)."""

    day: date
    key_id: str
    model: str
    counters: Counters


@dataclass(frozen=True, slots=True)
class InUse:
    """How much of its limits an API key uses at the moment.

    Attributes:
        debt: tokens of the last minute's limit that are not available again yet.
        reserved: tokens that its unfinished jobs are expected to use.
        today: tokens used since midnight UTC.
        day_left_s: seconds until the next midnight.
        queued: number of waiting jobs by model.
        bytes: Redis memory that its unfinished jobs have reserved.
        running: number of running jobs.
    """

    debt: float
    reserved: int
    today: int
    day_left_s: float
    queued: dict[str, int]
    bytes: int
    running: int


class UsageStore:
    """Reads usage. Methods raise `redis.RedisError` if Redis is unreachable."""

    def __init__(self, client: Redis) -> None:
        self._client = client

    def today(self) -> date:
        """Return the current day in UTC, by Redis's clock."""
        seconds, _ = self._client.time()
        return datetime.fromtimestamp(float(seconds), UTC).date()

    def read(self, key_ids: Sequence[str], first: date, last: date) -> list[UsageRow]:
        """Return the usage of API keys on the days from `first` to `last`, the newest day first."""
        days = (last - timedelta(days=n) for n in range((last - first).days + 1))
        wanted = ((day, key_id) for day in days for key_id in key_ids)
        rows: list[UsageRow] = []
        while some := [*islice(wanted, _PER_CALL)]:
            rows += self._rows(some)
        return rows

    def _rows(self, wanted: Sequence[tuple[date, str]]) -> Iterator[UsageRow]:
        with self._client.pipeline(transaction=False) as pipe:
            for day, key_id in wanted:
                pipe.hgetall(_day_key(key_id, day))
            found = pipe.execute()
        for (day, key_id), models in zip(wanted, found, strict=True):
            for model, text in sorted(models.items()):
                yield UsageRow(day, key_id, model, Counters.from_text(text))

    def in_use(self, key_id: str, tokens_per_minute: int, models: Iterable[str]) -> InUse:
        """Return how much of its limits an API key uses at the moment."""
        names = sorted(models)
        seconds, microseconds = self._client.time()
        now = float(seconds) + float(microseconds) / 1e6
        day = datetime.fromtimestamp(now, UTC).date()
        with self._client.pipeline(transaction=False) as pipe:
            pipe.hmget(keys.CHARGES + key_id, "debt", "at", "reserved")
            pipe.hvals(_day_key(key_id, day))
            pipe.hget(keys.BYTES, f"owner:{key_id}")
            for model in names:
                pipe.hget(keys.QUEUED + model, key_id)
            (debt, since, reserved), today, size, *queued = pipe.execute()
        paid = tokens_per_minute / 60 * (now - float(since or now))
        return InUse(
            debt=max(0.0, float(debt or 0) - paid) if tokens_per_minute else 0.0,
            reserved=max(0, int(reserved or 0)) if size else 0,  # without unfinished jobs, nothing is reserved
            today=sum(Counters.from_text(text).tokens for text in today),
            day_left_s=86400 - now % 86400,
            queued={model: int(count) for model, count in zip(names, queued, strict=True) if count},
            bytes=int(size or 0),
            running=self._running(key_id),
        )

    def _running(self, key_id: str) -> int:
        with self._client.pipeline(transaction=False) as pipe:
            for worker in self._client.zrange(keys.LEASES, 0, -1):
                pipe.smembers(keys.RUNNING + worker)
            job_ids = [job_id for members in pipe.execute() for job_id in members]
            for job_id in job_ids:
                pipe.hget(keys.JOB + job_id, "owner")
            return sum(owner == key_id for owner in pipe.execute())


def _day_key(key_id: str, day: date) -> str:
    return f"{keys.USAGE}{key_id}:{(day - _EPOCH).days}"
