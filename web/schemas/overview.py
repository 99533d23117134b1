"""The state of the service at a glance, and over the last hour."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from web.schemas.base import ResponseModel
from web.schemas.requests import PriorityName


class QueueView(ResponseModel):
    """The waiting jobs of a model in one priority class."""

    model: str
    priority: PriorityName
    waiting: int
    oldest_s: float = Field(description="Age of the oldest of them, in seconds")


class OverviewWorkerView(ResponseModel):
    """A model on a worker process."""

    worker: str = Field(description="Name of the process")
    model: str
    state: str = Field(description="`loading`, `ready` or `draining`")
    slots: int = Field(description="Maximum jobs that run at the same time")
    slots_used: int = Field(description="Jobs that are running")
    tokens_per_s: float = Field(description="Generated tokens per second over the last minute")
    memory_bytes: int = Field(description="Memory that MLX uses in the process, for all its models together")
    model_bytes: int = Field(description="Size of the model's weights in memory")
    uptime_s: float


class PercentilesView(ResponseModel):
    """Percentiles of a duration, in seconds."""

    p50: float
    p99: float


class SampleView(ResponseModel):
    """The state at one moment, and what happened since the sample before. Samples are 30 seconds apart."""

    at: float = Field(description="Seconds since the epoch")
    waiting: dict[str, int] = Field(description="Jobs in the queues, by priority class")
    running: int = Field(description="Jobs that were running")
    slots: int
    tokens_per_s: float
    memory_bytes: int
    ended: dict[str, int] = Field(description="Jobs that ended since the sample before, by status")
    ttft: PercentilesView | None = Field(description="Time from submission to the first token")
    itl: PercentilesView | None = Field(description="Time between two tokens of a job")


class OverviewView(ResponseModel):
    """The state of the service."""

    object: Literal["overview"] = "overview"
    queues: list[QueueView] = Field(description="The classes with waiting jobs")
    workers: list[OverviewWorkerView]
    tokens_per_s: float
    memory_bytes: int
    samples: list[SampleView] = Field(
        description="The last hour, oldest first. The background process takes the samples; without it there are none"
    )
