"""Who is there: the workers alive and the models they know, as they tell it themselves."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Self

from shared.models.image_geometry import ImageGeometry
from shared.queue import keys
from shared.queue.redis import Redis, script
from shared.wire import known

LEAST_CACHE: Final = 0.02
"""The part of a worker's memory that must be left for the caches of jobs."""


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What the API must know of a model without loading it.

    Attributes:
        context: most tokens of prompt and answer together.
        chat_template: the Jinja template for messages; None when the model has none.
        bos_token, eos_token: as templates use them; None when there is none.
        tokenizer: digest under which the registry keeps the model's `tokenizer.json`; None when it has none.
        image: the fields of its `ImageGeometry`; None: it takes no images.
    """

    id: str
    kind: str
    context: int
    chat_template: str | None = None
    bos_token: str | None = None
    eos_token: str | None = None
    tokenizer: str | None = None
    image: dict[str, int] | None = None

    @property
    def geometry(self) -> ImageGeometry | None:
        """How it resizes images; None: it takes none."""
        return ImageGeometry(**self.image) if self.image else None

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote, here or in another version."""
        return cls(**known(cls, json.loads(text)))


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """What a worker says of itself with each renewal of its lease. Times: seconds since the epoch.

    Attributes:
        node: its Celery node name, which answers pings.
        state: `loading`, `ready` or `draining`; only a ready worker takes jobs.
        slots, slots_used: rows of the batch, and those taken.
        heartbeat_at: when this was written.
        stats: counters and gauges for `/metrics` (tokens, steps, batch size, memory, …), all numbers.
        about: facts that do not change (device, BLAS, GFLOP/s, versions), for `/health`.
    """

    id: str
    node: str
    host: str
    pid: int
    model: str
    state: str
    slots: int
    slots_used: int
    started_at: float
    heartbeat_at: float
    stats: dict[str, float]
    about: dict[str, Any]

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote, here or in another version."""
        return cls(**known(cls, json.loads(text)))


@dataclass(frozen=True, slots=True)
class HostInfo:
    """What a worker process says of itself, whatever models it has. Times: seconds since the epoch.

    Attributes:
        node: its Celery node name.
        models: ids of those it has or is loading.
        memory_limit: bytes that models and caches may take together.
        memory_used, memory_pinned: bytes that models take, and those of them that no other model may have.
        operations: ids of the loadings and unloadings that it has in hand (`shared.models.operations`).
    """

    node: str
    host: str
    pid: int
    started_at: float
    heartbeat_at: float
    models: tuple[str, ...]
    memory_limit: int
    memory_used: int
    memory_pinned: int = 0
    operations: tuple[str, ...] = ()

    def could_take(self, weights_bytes: int) -> bool:
        """Whether a model fits, once all others have gone that may."""
        return weights_bytes + self.memory_pinned <= (1 - LEAST_CACHE) * self.memory_limit

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote, here or in another version."""
        data = known(cls, json.loads(text))
        return cls(**data | {name: tuple(data.get(name, ())) for name in ("models", "operations")})


class Registry:
    """Cards of models and workers in Redis. Methods raise `redis.RedisError` when Redis is away."""

    def __init__(self, client: Redis) -> None:
        self._client = client
        self._introduce = script(client, "introduce")
        self._announce = script(client, "announce")

    def announce_model(self, card: ModelCard, tokenizer_json: str | None = None) -> None:
        """Make a model known; it stays known while its workers restart."""
        self._introduce(args=[card.id, card.to_json(), card.tokenizer or "", tokenizer_json or ""])

    def models(self) -> dict[str, ModelCard]:
        """All models ever announced."""
        return {name: ModelCard.from_json(text) for name, text in self._client.hgetall(keys.MODELS).items()}

    def tokenizer_json(self, digest: str) -> str | None:
        """The text of a model's `tokenizer.json`."""
        text = self._client.get(keys.TOKENIZER + digest)
        return None if text is None else str(text)

    def announce_worker(self, info: WorkerInfo, lifetime_s: float) -> None:
        """Tell the state of a worker; it is forgotten when not told again in time."""
        self._announce(args=[info.id, info.to_json(), round(lifetime_s * 1000), info.heartbeat_at])

    def workers(self) -> list[WorkerInfo]:
        """The workers alive, by id."""
        names = sorted(self._client.zrange(keys.WORKERS, 0, -1))
        cards = self._client.mget([keys.WORKER + name for name in names]) if names else []
        gone = [name for name, card in zip(names, cards, strict=True) if card is None]
        if gone:
            self._client.zrem(keys.WORKERS, *gone)
        return [WorkerInfo.from_json(card) for card in cards if card is not None]

    def announce_host(self, info: HostInfo, lifetime_s: float) -> None:
        """Tell the state of a worker process; it is forgotten when not told again in time."""
        with self._client.pipeline() as pipe:
            pipe.set(keys.HOST + info.node, info.to_json(), px=round(lifetime_s * 1000))
            pipe.zadd(keys.HOSTS, {info.node: info.heartbeat_at})
            pipe.execute()

    def forget_host(self, node: str) -> None:
        """A worker process ends."""
        self._client.delete(keys.HOST + node)

    def hosts(self) -> list[HostInfo]:
        """The worker processes alive, by node."""
        names = sorted(self._client.zrange(keys.HOSTS, 0, -1))
        cards = self._client.mget([keys.HOST + name for name in names]) if names else []
        if gone := [name for name, card in zip(names, cards, strict=True) if card is None]:
            self._client.zrem(keys.HOSTS, *gone)
        return [HostInfo.from_json(card) for card in cards if card is not None]

    def waiting(self, model: str) -> int:
        """How many jobs wait for a model."""
        return int(self._client.zcard(keys.QUEUE + model))

    def waiting_each(self, models: Sequence[str]) -> list[int]:
        """The same for several, in one call."""
        with self._client.pipeline(transaction=False) as pipe:
            for model in models:
                pipe.zcard(keys.QUEUE + model)
            return [int(count) for count in pipe.execute()]

    def mean_job_s(self, model: str) -> float | None:
        """Moving average of the running time of a model's jobs, in seconds."""
        mean = self._client.hget(keys.SPEED + model, "mean_s")
        return None if mean is None else float(mean)

    def ended(self) -> dict[tuple[str, str], int]:
        """How many jobs of a (model, status) have ended."""
        return self._counts(keys.ENDED)

    def routed(self) -> dict[tuple[str, str], int]:
        """How many jobs of a model went to the `keeper` of their prefix, were `left` to it, or went to `another`."""
        return self._counts(keys.ROUTED)

    def _counts(self, key: str) -> dict[tuple[str, str], int]:
        split = ((name.rpartition(":"), int(n)) for name, n in self._client.hgetall(key).items())
        return {(model, word): n for (model, _, word), n in split}


def digest(text: str) -> str:
    """The name under which a tokenizer is kept."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]
