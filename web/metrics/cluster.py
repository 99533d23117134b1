"""The metrics of the whole cluster, read from Redis at each scrape, so that every API process shows the same values."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from typing import Final

import redis
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from shared.jobs.record import Priority
from shared.models.registry import Registry
from shared.queue.depths import QueueDepths
from shared.redis import keys
from shared.redis.client import Redis
from web.metrics.background import background_metrics
from web.metrics.workers import worker_metrics

KEYS_SHOWN: Final = 50
"""API keys that have series of their own. More would make the page large where keys are many."""
OTHER_KEYS: Final = "other"
"""Label of all other keys together."""


class ClusterCollector(Collector):
    """Collects the state of queues, workers, batches and webhooks, the same in every API process, from Redis."""

    def __init__(self, client: Redis) -> None:
        self._client = client
        self._registry = Registry(client)
        self._depths = QueueDepths(client)

    def collect(self) -> Iterator[Metric]:
        """Yield the current state; only `mlxq_redis_up` if Redis is unavailable."""
        try:
            metrics = [
                *self._redis(),
                *self._queues(),
                *self._counts(),
                *self._workers(),
                *background_metrics(self._client),
            ]
        except redis.RedisError:
            metrics = []
        yield GaugeMetricFamily("mlxq_redis_up", "Whether Redis answers", value=float(bool(metrics)))
        yield from metrics

    def _redis(self) -> Iterator[Metric]:
        began = time.monotonic()
        self._client.ping()
        yield GaugeMetricFamily("mlxq_redis_ping_seconds", "Time of a ping of Redis", value=time.monotonic() - began)
        used, maximum = (float(value or 0) for value in self._client.hmget(keys.MEMORY, "used", "max"))
        yield GaugeMetricFamily("mlxq_redis_memory_bytes", "Memory that Redis uses", value=used)
        yield GaugeMetricFamily("mlxq_redis_memory_limit_bytes", "Memory limit of Redis; 0: none", value=maximum)
        reserved = float(self._client.hget(keys.BYTES, "total") or 0)
        yield GaugeMetricFamily("mlxq_queue_bytes", "Memory in Redis that unfinished jobs reserve", value=reserved)

    def _queues(self) -> Iterator[Metric]:
        by_class = ["model", "priority"]
        waiting = GaugeMetricFamily("mlxq_jobs_waiting", "Jobs in the queue", labels=by_class)
        oldest = GaugeMetricFamily("mlxq_oldest_job_age_seconds", "Age of the oldest job in the queue", labels=by_class)
        models = self._registry.models()
        depths = {(depth.model, depth.priority): depth for depth in self._depths.read(models)}
        for model, priority in product(models, Priority):
            depth = depths.get((model, priority))
            waiting.add_metric([model, priority.label], depth.waiting if depth else 0)
            oldest.add_metric([model, priority.label], depth.oldest_s if depth else 0.0)
        yield from (waiting, oldest)

    def _counts(self) -> Iterator[Metric]:
        ended = CounterMetricFamily("mlxq_jobs_ended", "Jobs that ended", labels=["model", "status"])
        yield _counted(ended, self._registry.ended().items())
        attempts_help = "Attempts that ended; worker_lost: the worker died and the job was recovered or failed"
        attempts = CounterMetricFamily("mlxq_attempts_ended", attempts_help, labels=["model", "outcome"])
        yield _counted(attempts, self._registry.attempts().items())
        routed_help = "Jobs claimed by the worker that holds their prefix, deferred to it, or then claimed by another"
        routed = CounterMetricFamily("mlxq_jobs_routed", routed_help, labels=["model", "outcome"])
        yield _counted(routed, self._registry.routed().items())
        yield from self._tokens()

    def _tokens(self) -> Iterator[Metric]:
        """Yield the tokens of ended jobs, in all and by API key.

        A key that has a series keeps it. If the keys with most tokens had series, the series of all others would fall
        whenever a key joins the first ones, which Prometheus takes for a restart.
        """
        tokens = self._registry.tokens()
        label = "gen_ai_token_type"
        total = CounterMetricFamily("mlxq_tokens", "Tokens of jobs that ended", labels=[label])
        help_text = f"Tokens of jobs that ended, by API key; of all keys but {KEYS_SHOWN} together: {OTHER_KEYS}"
        each = CounterMetricFamily("mlxq_key_tokens", help_text, labels=["key", label])
        used, by_type, by_key = Counter[str](), Counter[str](input=0, output=0), Counter[tuple[str, str]]()
        for (key, _), count in tokens.items():
            used[key] += count
        shown = self._shown_keys([key for key, _ in used.most_common()])
        for (key, kind), count in tokens.items():
            by_type[kind] += count
            by_key[key if key in shown else OTHER_KEYS, kind] += count
        yield _counted(total, (((kind,), count) for kind, count in by_type.items()))
        yield _counted(each, by_key.items())

    def _shown_keys(self, used: Sequence[str]) -> set[str]:
        """Return the keys that have series of their own: those that had them before, and others while there is room.

        Args:
            used: the keys that have used tokens, those with most first.
        """
        shown = self._client.zrange(keys.SHOWN_KEYS, 0, KEYS_SHOWN - 1)
        new = [key for key in used if key not in shown][: KEYS_SHOWN - len(shown)]
        if new:
            self._client.zadd(keys.SHOWN_KEYS, dict.fromkeys(new, time.time()), nx=True)
            shown = self._client.zrange(keys.SHOWN_KEYS, 0, KEYS_SHOWN - 1)
        return set(shown)

    def _workers(self) -> Iterator[Metric]:
        workers = self._registry.workers()
        states = Counter((worker.model, worker.state) for worker in workers)
        family = GaugeMetricFamily("mlxq_workers", "Workers that are alive", labels=["model", "state"])
        yield _counted(family, states.items())
        yield from worker_metrics(workers, {card.id: card.kind for card in self._registry.models().values()})


def _counted(
    family: CounterMetricFamily | GaugeMetricFamily, counts: Iterable[tuple[Sequence[str], int]]
) -> CounterMetricFamily | GaugeMetricFamily:
    for labels, count in counts:
        family.add_metric(labels, count)
    return family
