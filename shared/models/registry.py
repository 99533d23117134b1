"""The registry of live workers and of the models that they have announced."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import IntEnum
from typing import Any, Final, Self, TypeVar

from shared.histogram import Histogram
from shared.models.image_geometry import Coordinates, ImageGeometry
from shared.models.image_tokens import ImageTokens, from_record
from shared.redis import keys
from shared.redis.client import Redis, script
from shared.wire import enum_member, known_fields

log = logging.getLogger(__name__)

C = TypeVar("C")

MIN_CACHE_SHARE: Final = 0.02
"""Minimum share of a worker's memory that must remain free for the caches of jobs."""


@dataclass(frozen=True, slots=True)
class Starts:
    """Starts of a class of jobs.

    Attributes:
        turns: how far the class advanced in turns; see `next_turn` in `lib/queue.lua`.
    """

    number: float = 0.0
    turns: float = 0.0
    seconds: float = 0.0

    @classmethod
    def from_record(cls, record: Mapping[str, str], priority: int) -> Self:
        """Parse the fields of a class that `lib/queue.lua` writes."""
        return cls(*(float(record.get(f"{name}:{priority}", 0)) for name in ("starts", "turns", "seconds")))


@dataclass(frozen=True, slots=True)
class Speed:
    """How fast the jobs of a model run and start.

    Attributes:
        mean_s: moving average of the running time in seconds; None if no job has ended.
        starts: by class, recent starts while other jobs of the class waited.
    """

    mean_s: float | None = None
    starts: Mapping[int, Starts] = field(default_factory=dict)

    @classmethod
    def from_record(cls, record: Mapping[str, str]) -> Self:
        """Parse a record that `lib/queue.lua` and `lib/job.lua` write."""
        classes = [int(name[len(_STARTS) :]) for name in record if name.startswith(_STARTS)]
        starts = {each: Starts.from_record(record, each) for each in classes}
        return cls(float(record["mean_s"]) if "mean_s" in record else None, starts)


_STARTS: Final = "starts:"


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What the API needs to know about a model without loading it.

    Attributes:
        kind: `text`, `vision`, `embedding` or `rerank`.
        context: maximum tokens of prompt and answer together; of an input, for embedding models and rerankers.
        chat_template: the Jinja template for messages; None if the model has none.
        tool_template: the template for messages with tools, if it is another one.
        bos_token, eos_token: special tokens for the template; None if the model has none.
        tokenizer: digest of the model's `tokenizer.json` (`shared.tokenizing.files`). None if a worker must tokenise,
            because it could not verify that the API would produce the same tokens.
        template_variables: variables of the template in addition to the messages.
        image: fields of `ImageGeometry`; None if the model accepts no images, or resizes them by another rule.
        image_tokens: that rule, as in `shared.models.image_tokens`; None in cards of earlier versions.
        coordinates: what the coordinates in its answers refer to; see `Coordinates`.
        vocabulary: number of tokens that the embedding has; None in cards of earlier versions.
        sampling: sampling parameters declared by the model's files; None in cards of earlier versions.
        reasoning: whether the model marks its reasoning, so that its length can be limited. None in cards of earlier
            versions, which have none of these three fields.
        tool_format: name of the format in which the model calls tools. `generic`: the prompt explains it
            (`shared.tokenizing.generic_tools`). None if the model has no chat template.
        structured: whether answers can be constrained.
        text_only: whether the model's folder also has an image encoder, which is not used.
        adapters: the adapters that requests can name, each with why it cannot be used, or an empty text. None in cards
            of earlier versions.
        dimensions: length of the vectors of an embedding model; None for other kinds.
        pair_template: how a reranker's inputs are written, a name in `shared.tokenizing.inputs`; None if its tokenizer
            joins the two texts.
        prompts: texts that an embedding model's files declare, by name, to be put before inputs.
        default_prompt: name of the prompt for requests that name none.
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
    image_tokens: dict[str, Any] | None = None
    vocabulary: int | None = None
    reasoning: bool | None = None
    tool_format: str | None = None
    structured: bool = False
    text_only: bool = False
    tool_template: str | None = None
    sampling: dict[str, float] | None = None
    coordinates: str = Coordinates.PIXELS.value
    adapters: dict[str, str] | None = None
    dimensions: int | None = None
    pair_template: str | None = None
    prompts: dict[str, str] | None = None
    default_prompt: str | None = None

    @property
    def coordinate_kind(self) -> Coordinates:
        """What the coordinates refer to. A kind that only newer processes know is read as pixels."""
        return enum_member(Coordinates, self.coordinates, Coordinates.PIXELS)

    @property
    def geometry(self) -> ImageGeometry | None:
        """How the model resizes images; None if it accepts none, or resizes them by another rule."""
        return ImageGeometry(**known_fields(ImageGeometry, self.image)) if self.image else None

    @property
    def token_rule(self) -> ImageTokens | None:
        """How many tokens an image takes; None if only the worker knows."""
        return self.geometry or (from_record(self.image_tokens) if self.image_tokens else None)

    def to_json(self) -> str:
        """Encode as one line of JSON."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Parse the output of `to_json`, also that of another version."""
        return cls(**known_fields(cls, json.loads(text)))


class WorkerProtocol(IntEnum):
    """Which requests a worker understands: each value includes all lower ones.

    Attributes:
        GENERATION: requests of the versions without tools, whose workers announce no protocol.
        OPTIONS: tools, constraints, and options of reasoning and templates.
        INPUTS: jobs of embedding models and rerankers.
        ADAPTERS: adapters.
    """

    GENERATION = 0
    OPTIONS = 1
    INPUTS = 2
    ADAPTERS = 3


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """The state of a worker, announced with each renewal of its lease.

    After reading, `started_at` and `heartbeat_at` are seconds since the epoch by Redis's clock. A worker that announces
    itself may use any clock for both: only their difference is stored.

    Attributes:
        id: id of the lease: `node`, a slash and random characters, which differ each time that the model is loaded.
        node: name of the worker process, which is also its Celery node name. A process may have several workers.
        state: `loading`, `ready` or `draining`; only a ready worker claims jobs.
        slots, slots_used: rows of the batch, and occupied rows.
        heartbeat_at: time of the announcement.
        stats: counters and gauges for `/metrics` (tokens, steps, batch size, memory, …).
        about: constant facts for `/health` (device, BLAS, GFLOP/s, versions).
        protocol: which requests the worker understands; a `WorkerProtocol` or, in a newer version, a higher number.
        histograms: latencies since the start of the worker.
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
    protocol: int = WorkerProtocol.GENERATION
    histograms: tuple[Histogram, ...] = ()

    def to_json(self) -> str:
        """Encode as one line of JSON without the times, which `announce_worker.lua` adds."""
        return _card_json(self)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Parse the output of `to_json`, also that of another version."""
        data = known_fields(cls, json.loads(text))
        stats = {name: value for name, value in data["stats"].items() if isinstance(value, int | float)}
        histograms = tuple(_histograms(data.get("histograms", ())))
        return cls(**data | {"stats": stats, "histograms": histograms})


@dataclass(frozen=True, slots=True)
class HostInfo:
    """The state of a worker process, which may have several workers or none. Times are as in `WorkerInfo`.

    Attributes:
        node: its name (`worker.process.identity`), which is also its Celery node name.
        models: ids of models that are loaded or being loaded.
        memory_limit: maximum bytes of models and caches together.
        memory_used, memory_pinned: bytes of all models, and of models that are never unloaded for another one.
        operations: ids of loads and unloads that it is executing or has queued (`shared.models.operations`).
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

    def can_fit(self, weights_bytes: int) -> bool:
        """Whether a model fits after all models that are not pinned have been unloaded."""
        return weights_bytes + self.memory_pinned <= (1 - MIN_CACHE_SHARE) * self.memory_limit

    def to_json(self) -> str:
        """Encode as one line of JSON without the times, which `announce_worker.lua` adds."""
        return _card_json(self)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Parse the output of `to_json`, also that of another version."""
        data = known_fields(cls, json.loads(text))
        return cls(**data | {name: tuple(data.get(name, ())) for name in ("models", "operations")})


class Registry:
    """Models and workers in Redis. Methods raise `redis.RedisError` if Redis is unreachable."""

    def __init__(self, client: Redis) -> None:
        self._client = client
        self._announce_model = script(client, "announce_model")
        self._announce_worker = script(client, "announce_worker")

    def announce_model(self, card: ModelCard) -> bool:
        """Store a model's card. It is never deleted, so the model stays known while its workers restart.

        Returns:
            Whether the card names a tokenizer that Redis lacks (`shared.tokenizing.files.TokenizerStore`).
        """
        return bool(self._announce_model(args=[card.id, card.to_json(), card.tokenizer or ""]))

    def models(self) -> dict[str, ModelCard]:
        """Return the cards of all models ever announced, by id."""
        return {name: ModelCard.from_json(text) for name, text in self._client.hgetall(keys.MODELS).items()}

    def mark_servable(self, models: Iterable[str]) -> None:
        """Record that these models can be served now."""
        now, _ = self._client.time()
        if marks := dict.fromkeys(models, float(now)):
            self._client.zadd(keys.SERVABLE, marks)

    def servable(self, within_s: float) -> set[str]:
        """Return the models that some process could serve in the last `within_s` seconds."""
        now, _ = self._client.time()
        return set(self._client.zrange(keys.SERVABLE, now - within_s, "+inf", byscore=True))

    def known_models(self) -> set[str]:
        """Return the ids of all models that were ever announced or marked as servable."""
        return {*self._client.hkeys(keys.MODELS), *self._client.zrange(keys.SERVABLE, 0, -1)}

    def announce_worker(self, info: WorkerInfo, lifetime_s: float) -> None:
        """Store the state of a worker; it expires unless it is announced again in time."""
        self._write("WORKER", info.id, info, lifetime_s)

    def workers(self) -> list[WorkerInfo]:
        """Return the live workers, sorted by id."""
        return self.workers_now()[1]

    def workers_now(self) -> tuple[float, list[WorkerInfo]]:
        """Return the time by Redis's clock in seconds since the epoch, and the workers live then, sorted by id."""
        return self._read(keys.WORKERS, keys.WORKER, WorkerInfo.from_json)

    def announce_host(self, info: HostInfo, lifetime_s: float) -> None:
        """Store the state of a worker process; it expires unless it is announced again in time."""
        self._write("HOST", info.node, info, lifetime_s)

    def forget_host(self, node: str) -> None:
        """Delete the state of a worker process that ends."""
        self._client.delete(keys.HOST + node)

    def hosts(self) -> list[HostInfo]:
        """Return the live worker processes, sorted by node."""
        return self._read(keys.HOSTS, keys.HOST, HostInfo.from_json)[1]

    def _write(self, kind: str, name: str, card: WorkerInfo | HostInfo, lifetime_s: float) -> None:
        uptime_s = card.heartbeat_at - card.started_at
        self._announce_worker(args=[kind, name, card.to_json(), round(lifetime_s * 1000), uptime_s])

    def _read(self, index: str, prefix: str, parse: Callable[[str], C]) -> tuple[float, list[C]]:
        """Return the time and all cards that an index names. Removes names without a card from the index."""
        names = sorted(self._client.zrange(index, 0, -1))
        with self._client.pipeline(transaction=False) as pipe:
            pipe.time()
            for name in names:
                pipe.get(prefix + name)
            (seconds, microseconds), *cards = pipe.execute()
        if expired := [name for name, card in zip(names, cards, strict=True) if card is None]:
            self._client.zrem(index, *expired)
        return seconds + microseconds / 1e6, list(_readable(cards, parse))

    def waiting(self, model: str) -> int:
        """Return the number of queued jobs of a model."""
        return self.waiting_each([model])[0]

    def waiting_each(self, models: Sequence[str]) -> list[int]:
        """Return the numbers of queued jobs of several models with one call."""
        with self._client.pipeline(transaction=False) as pipe:
            for model in models:
                pipe.zcard(keys.QUEUE + model)
            pipe.hgetall(keys.PARKED_COUNTS)
            *counts, parked = pipe.execute()
        by_model = Counter[str]()
        for name, count in parked.items():
            by_model[name.rpartition(" ")[0]] += int(count)
        return [int(count) + by_model[model] for model, count in zip(models, counts, strict=True)]

    def speeds(self, models: Iterable[str]) -> dict[str, Speed]:
        """Return how fast the jobs of models run and start."""
        names = list(models)
        with self._client.pipeline(transaction=False) as pipe:
            for model in names:
                pipe.hgetall(keys.SPEED + model)
            found = pipe.execute() if names else []
        return {model: Speed.from_record(record) for model, record in zip(names, found, strict=True)}

    def ended(self) -> dict[tuple[str, str], int]:
        """Return the number of jobs that have ended, by (model, status)."""
        return self._counts(keys.ENDED)

    def routed(self) -> dict[tuple[str, str], int]:
        """Return the number of jobs that prefix affinity affected, by (model, outcome).

        The outcomes are `preferred` (claimed by the preferred worker), `deferred` (left to the preferred worker for
        some time) and `another` (deferred, then claimed by another worker).
        """
        return self._counts(keys.ROUTED)

    def attempts(self) -> dict[tuple[str, str], int]:
        """Return the number of attempts that have ended, by (model, value of `AttemptEnd`)."""
        return self._counts(keys.ATTEMPTS)

    def tokens(self) -> dict[tuple[str, str], int]:
        """Return the number of tokens of ended jobs, by (API key id, `input` or `output`)."""
        return self._counts(keys.TOKENS)

    def _counts(self, key: str) -> dict[tuple[str, str], int]:
        counts = ((field.rpartition(":"), int(count)) for field, count in self._client.hgetall(key).items())
        return {(model, label): count for (model, _, label), count in counts}


def _card_json(card: WorkerInfo | HostInfo) -> str:
    fields = asdict(card)
    del fields["started_at"], fields["heartbeat_at"]
    return json.dumps(fields, ensure_ascii=False)


def _histograms(entries: Iterable[Any]) -> Iterable[Histogram]:
    """Yield the histograms that this version can read."""
    for entry in entries:
        try:
            yield Histogram.from_wire(entry)
        except (ValueError, TypeError, KeyError) as error:
            log.warning("histogram_not_read", extra={"reason": str(error)})


def _readable(cards: Iterable[str | None], parse: Callable[[str], C]) -> Iterable[C]:
    """Yield the cards that this version can parse. A card of a newer version must not hide the others."""
    for card in cards:
        try:
            if card is not None:
                yield parse(card)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            log.warning("worker_card_not_read", extra={"reason": str(error)})
