"""Health of the service."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, RootModel

from web.schemas.base import ResponseModel

HealthStatus = Literal["ok", "degraded", "down"]


class WorkerMemory(ResponseModel):
    """MLX memory of a worker process, in bytes."""

    active_bytes: int = Field(description="Memory in use")
    cache_bytes: int = Field(description="Free memory that MLX keeps for reuse")
    peak_bytes: int = Field(description="Highest memory in use so far")


class WorkerView(ResponseModel):
    """A model on a worker process: what the worker reports, and how fast it answers a ping."""

    id: str = Field(description="Id of the worker's lease; changes each time the model is loaded")
    host: str
    node: str = Field(description="Name of the process, as in `/metrics`, logs and Flower; `load_model` accepts it")
    model: str
    state: str = Field(description="`loading`, `ready` or `draining`; only a ready worker takes jobs")
    heartbeat_age_s: float = Field(description="Seconds since the last heartbeat")
    response_s: float | None = Field(description="Seconds that a ping took; null if there was no reply")
    slots: int = Field(description="Maximum jobs that run at the same time")
    slots_used: int = Field(description="Jobs that are running")
    uptime_s: float
    memory: WorkerMemory | None = Field(description="Memory of the process; null before a model is loaded")
    about: dict[str, Any] = Field(description="Facts that do not change: device, BLAS library, versions")


class RedisView(ResponseModel):
    """The Redis server that holds the queue."""

    reachable: bool
    response_s: float | None = Field(description="Seconds that a ping took")


class HealthSummary(ResponseModel):
    """What requests without an API key see."""

    status: HealthStatus = Field(description="`degraded`: jobs run, but something is wrong; `down`: no job can run now")
    models: int = Field(description="Number of models that are ready for jobs")


class HealthView(HealthSummary):
    """Health of the service."""

    version: str = Field(description="Version of the API process")
    reasons: list[str] = Field(description="Why the status is not `ok`, for people")
    redis: RedisView
    workers: list[WorkerView]
    queues: dict[str, int] = Field(description="Number of waiting jobs, by model")


class HealthAnswer(RootModel[HealthView | HealthSummary]):
    """The details with a valid API key, otherwise the summary."""


class ProbeView(ResponseModel):
    """Result of a liveness or readiness probe."""

    status: Literal["ok", "unavailable"]
