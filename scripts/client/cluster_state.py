"""What a service is doing, read over its HTTP API: metrics, health and running jobs."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Final, Self

from prometheus_client.parser import text_string_to_metric_families

from scripts.client.api import Client, Refused, Unreachable
from shared.histogram import quantile

MAX_JOBS: Final = 20
"""Maximum running jobs that are read, the newest ones."""
_MAX_LISTED: Final = 100
_PROBES: Final = ("/health", "/readyz")
"""Their status is 503 while no job can run."""
_NOT_ALLOWED: Final = (403, 404, 422)
"""Statuses of an API that refuses to list the jobs of all keys, or does not know these filters."""

Labels = tuple[str, ...]
Json = dict[str, Any]


class Page:
    """A page of metrics."""

    def __init__(self, text: str) -> None:
        self._samples: defaultdict[str, list[tuple[Mapping[str, str], float]]] = defaultdict(list)
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                self._samples[sample.name].append((sample.labels, sample.value))

    def by(self, name: str, *labels: str, **where: str) -> dict[Labels, float]:
        """Sum a metric by labels, over the samples that have the values `where`."""
        sums: defaultdict[Labels, float] = defaultdict(float)
        for found, value in self._samples[name]:
            if all(found.get(label) == wanted for label, wanted in where.items()):
                sums[tuple(found.get(label, "") for label in labels)] += value
        return dict(sums)

    def sum(self, name: str, **where: str) -> float:
        """Sum a metric over the samples that have the values `where`."""
        return self.by(name, **where).get((), 0.0)

    def buckets(self, name: str, **where: str) -> dict[float, float]:
        """Return the cumulative buckets of a histogram, by upper bound."""
        return {float(bound): count for (bound,), count in self.by(f"{name}_bucket", "le", **where).items()}


@dataclass(frozen=True, slots=True)
class State:
    """What a service was doing at one moment.

    Attributes:
        read_at: monotonic moment.
        health: as `GET /health` returns it.
        jobs: running jobs as the API lists them.
        all_keys: whether the jobs of all API keys are listed.
    """

    read_at: float
    page: Page
    health: Json
    jobs: list[Json]
    all_keys: bool

    @classmethod
    def read(cls, client: Client) -> Self:
        """Read the state.

        Raises:
            ClientError: the service does not answer, or refuses the API key.
        """
        try:
            jobs, all_keys = _running_jobs(client)
            page = Page(client.request("GET", "/metrics").text)
            health = client.request("GET", "/health", also=[HTTPStatus.SERVICE_UNAVAILABLE]).json()
        except (ValueError, KeyError, TypeError) as error:
            raise Unreachable("the server at this address is not mlxq") from error
        return cls(time.monotonic(), page, health, jobs, all_keys)


def _running_jobs(client: Client) -> tuple[list[Json], bool]:
    """Return running jobs, and whether they are those of all API keys."""
    for filters in ("&status=running&key=all", "&status=running"):
        try:
            return _list(client, filters), "key=all" in filters
        except Refused as error:
            if error.status not in _NOT_ALLOWED:
                raise
    return _list(client), False


def _list(client: Client, filters: str = "") -> list[Json]:
    limit = MAX_JOBS if filters else _MAX_LISTED
    jobs = client.request("GET", f"/v1/jobs?limit={limit}{filters}").json()["data"]
    return [job for job in jobs if job["status"] == "running"][:MAX_JOBS]


@dataclass(frozen=True, slots=True)
class Latency:
    """The median and the 99th percentile in seconds; None without observations."""

    median: float | None
    p99: float | None


@dataclass(slots=True)
class History:
    """The states of the last minute."""

    states: list[State] = field(default_factory=list)
    window_s: float = 60.0

    def add(self, state: State) -> None:
        """Add the newest state."""
        self.states.append(state)
        while len(self.states) > 2 and self.states[1].read_at <= state.read_at - self.window_s:
            del self.states[0]

    @property
    def now(self) -> State:
        """The newest state."""
        return self.states[-1]

    def per_second(self, name: str, **where: str) -> float:
        """Return how fast a counter has grown."""
        first, last = self.states[0], self.now
        elapsed_s = last.read_at - first.read_at
        grown = last.page.sum(name, **where) - first.page.sum(name, **where)
        return max(0.0, grown) / elapsed_s if elapsed_s > 0 else 0.0  # less: a worker was started anew

    def server_errors(self) -> float:
        """Return the requests per second that failed with a status of 500 or more, except for health probes."""
        name = "flask_http_request_duration_seconds_count"
        return sum(
            self.per_second(name, status=status, url_rule=route)
            for status, route in self.now.page.by(name, "status", "url_rule")
            if status >= "500" and route not in _PROBES
        )

    def latency(self, name: str, **where: str) -> Latency:
        """Return percentiles of a histogram's new observations; if there are none, since the start of the workers."""
        last = self.now.page.buckets(name, **where)
        first = self.states[0].page.buckets(name, **where)
        grown = {bound: count - first.get(bound, 0.0) for bound, count in last.items()}
        shown = grown if grown and max(grown.values()) > 0 else last
        bounds = sorted(bound for bound in shown if bound != float("inf"))
        cumulative = [shown[bound] for bound in sorted(shown)]
        counts = [count - before for count, before in zip(cumulative, [0.0, *cumulative], strict=False)]
        if not bounds:
            return Latency(None, None)
        return Latency(quantile(0.5, bounds, counts), quantile(0.99, bounds, counts))

    def chunks_per_second(self, job: Json) -> float | None:
        """Return how fast a running job writes events; None if it was not seen before."""
        for state in self.states[:-1]:
            for earlier in state.jobs:
                if earlier["id"] == job["id"] and earlier["attempt"] == job["attempt"]:
                    return float(job["last_event"] - earlier["last_event"]) / (self.now.read_at - state.read_at)
        return None
