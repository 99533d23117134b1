"""The live workers and the models they know, as they announce them."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Self, TypeVar

from shared.models.image_geometry import ImageGeometry
from shared.queue import keys
from shared.queue.redis import Redis, script
from shared.wire import known

log = logging.getLogger(__name__)

C = TypeVar("C")

LEAST_CACHE: Final = 0.02
"""The part of a worker's memory that must be left for the caches of jobs."""


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What the API must know of a model without loading it.

    Attributes:
        context: most tokens of prompt and answer together.
        chat_template: the Jinja template for messages; None when the model has none.
        bos_token, eos_token: as templates use them; None when there is none.
        tokenizer: digest of the model's `tokenizer.json` (`shared.tokenizing.files`); None when the API cannot tokenise
            for the model, because its worker has not proved, or has disproved, that it would get the same tokens.
        template_variables: what the template finds beside the messages.
        image: the fields of its `ImageGeometry`; None: it takes no images.
    """

    id: str
    kind: str
    context: int
    chat_template: str | None = None
    bos_token: str | None = None
    eos_token: str | None = None
    tokenizer: str | None = None
    template_variables: dict[str, Any] | None = None
    image: dict[str, int] | None = None

    @property
    def geometry(self) -> ImageGeometry | None:
        """How it resizes images; None: it takes none."""
        return ImageGeometry(**known(ImageGeometry, self.image)) if self.image else None

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote, here or in another version."""
        return cls(**known(cls, json.loads(text)))


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """What a worker says of itself with each renewal of its lease.

    `started_at` and `heartbeat_at` are seconds since the epoch by Redis's clock where a card was read. Who announces
    one gives the present moment and its start by any one clock: only the time between them is used.

    Attributes:
        id: of its lease and its claims: `node`, a slash and a few characters that are new after each loading.
        node: its process's name, which is also a Celery node and answers pings. One process may have several models.
        state: `loading`, `ready` or `draining`; only a ready worker takes jobs.
        slots, slots_used: rows of the batch, and those taken.
        heartbeat_at: when the card was written.
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
        """One line of JSON; the moments are added where it is stored."""
        return _card_json(self)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote, here or in another version."""
        data = known(cls, json.loads(text))
        stats = {name: value for name, value in data["stats"].items() if isinstance(value, int | float)}
        return cls(**data | {"stats": stats})


@dataclass(frozen=True, slots=True)
class HostInfo:
    """What a worker process says of itself, whatever models it has. Times are as those of `WorkerInfo`.

    Attributes:
        node: its name (`worker.process.identity`), which is also its Celery node name.
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
        """One line of JSON; the moments are added where it is stored."""
        return _card_json(self)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote, here or in another version."""
        data = known(cls, json.loads(text))
        return cls(**data | {name: tuple(data.get(name, ())) for name in ("models", "operations")})


class Registry:
    """Cards of models and workers in Redis. Methods raise `redis.RedisError` when Redis is away."""

    def __init__(self, client: Redis) -> None:
        self._client = client
        self._introduce = script(client, "announce_model")
        self._announce = script(client, "announce_worker")

    def announce_model(self, card: ModelCard) -> bool:
        """Make a model known; it stays known while its workers restart.

        Returns:
            Whether the card names a tokenizer that Redis has not (`shared.tokenizing.files.TokenizerStore`).
        """
        return bool(self._introduce(args=[card.id, card.to_json(), card.tokenizer or ""]))

    def models(self) -> dict[str, ModelCard]:
        """All models ever announced."""
        return {name: ModelCard.from_json(text) for name, text in self._client.hgetall(keys.MODELS).items()}

    def announce_worker(self, info: WorkerInfo, lifetime_s: float) -> None:
        """Announce the state of a worker; it expires when it is not announced again in time."""
        self._write("WORKER", info.id, info, lifetime_s)

    def workers(self) -> list[WorkerInfo]:
        """The workers alive, by id."""
        return self.workers_now()[1]

    def workers_now(self) -> tuple[float, list[WorkerInfo]]:
        """The moment by Redis's clock (seconds since the epoch), and the workers alive then, by id."""
        return self._read(keys.WORKERS, keys.WORKER, WorkerInfo.from_json)

    def announce_host(self, info: HostInfo, lifetime_s: float) -> None:
        """Announce the state of a worker process; it expires when it is not announced again in time."""
        self._write("HOST", info.node, info, lifetime_s)

    def forget_host(self, node: str) -> None:
        """A worker process ends."""
        self._client.delete(keys.HOST + node)

    def hosts(self) -> list[HostInfo]:
        """The worker processes alive, by node."""
        return self._read(keys.HOSTS, keys.HOST, HostInfo.from_json)[1]

    def _write(self, kind: str, name: str, card: WorkerInfo | HostInfo, lifetime_s: float) -> None:
        uptime_s = card.heartbeat_at - card.started_at
        self._announce(args=[kind, name, card.to_json(), round(lifetime_s * 1000), uptime_s])

    def _read(self, index: str, prefix: str, parse: Callable[[str], C]) -> tuple[float, list[C]]:
        """The moment, and the cards that an index names; names without a card are taken out of it."""
        names = sorted(self._client.zrange(index, 0, -1))
        with self._client.pipeline(transaction=False) as pipe:
            pipe.time()
            for name in names:
                pipe.get(prefix + name)
            (seconds, microseconds), *cards = pipe.execute()
        if gone := [name for name, card in zip(names, cards, strict=True) if card is None]:
            self._client.zrem(index, *gone)
        return seconds + microseconds / 1e6, list(_readable(cards, parse))

    def waiting(self, model: str) -> int:
        """How many jobs wait for a model."""
        return int(self._client.zcard(keys.QUEUE + model))

    def waiting_each(self, models: Sequence[str]) -> list[int]:
        """The same for several, in one call."""
        with self._client.pipeline(transaction=False) as pipe:
            for model in models:
                pipe.zcard(keys.QUEUE + model)
            return [int(count) for count in pipe.execute()]

    def mean_job_s(self, models: Iterable[str]) -> dict[str, float]:
        """Moving average of the running time of each model's jobs, in seconds, where some have ended."""
        names = list(models)
        with self._client.pipeline(transaction=False) as pipe:
            for model in names:
                pipe.hget(keys.SPEED + model, "mean_s")
            means = pipe.execute() if names else []
        return {model: float(mean) for model, mean in zip(names, means, strict=True) if mean is not None}

    def ended(self) -> dict[tuple[str, str], int]:
        """How many jobs of a (model, status) have ended."""
        return self._counts(keys.ENDED)

    def routed(self) -> dict[tuple[str, str], int]:
        """Jobs by model and outcome: claimed by the `preferred` worker, `deferred` to it, claimed by `another` then."""
        return self._counts(keys.ROUTED)

    def _counts(self, key: str) -> dict[tuple[str, str], int]:
        split = ((name.rpartition(":"), int(n)) for name, n in self._client.hgetall(key).items())
        return {(model, word): n for (model, _, word), n in split}


def _card_json(card: WorkerInfo | HostInfo) -> str:
    fields = asdict(card)
    del fields["started_at"], fields["heartbeat_at"]
    return json.dumps(fields, ensure_ascii=False)


def _readable(cards: Iterable[str | None], parse: Callable[[str], C]) -> Iterable[C]:
    """The cards that this version can read. One of a much newer worker must not hide the others."""
    for card in cards:
        try:
            if card is not None:
                yield parse(card)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            log.warning("worker_card_not_read", extra={"reason": str(error)})
