"""The state of the service."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import (
    Field,
)

from web.schemas.base import ResponseModel


class WorkerMemory(ResponseModel):
    """Bytes that MLX holds in a worker process."""

    active_bytes: int = Field(description="In use")
    cache_bytes: int = Field(description="Kept for later use")
    peak_bytes: int = Field(description="Most that was in use")


class WorkerView(ResponseModel):
    """A worker, as it announced itself and as it answered a ping."""

    id: str = Field(description="Of its lease; new each time that the model is loaded")
    host: str
    node: str = Field(description="Name of its process, as in `/metrics`, logs, Flower and `load_model`")
    model: str
    state: str
    heartbeat_age_s: float
    response_s: float | None = Field(description="Of a Celery control ping; null when it did not answer")
    slots: int
    slots_used: int
    uptime_s: float
    memory: WorkerMemory | None = Field(description="Of its process, as MLX counts; null before a model is loaded")
    about: dict[str, Any]


class RedisView(ResponseModel):
    """The queue's Redis."""

    reachable: bool
    response_s: float | None


class HealthView(ResponseModel):
    """How the service is. `down` means that no job can be run at present."""

    status: Literal["ok", "degraded", "down"]
    reasons: list[str]
    redis: RedisView
    workers: list[WorkerView]
    queues: dict[str, int] = Field(description="Jobs that wait, by model")


class ProbeView(ResponseModel):
    """The answer of a probe."""

    status: Literal["ok", "unavailable"]
