"""Webhook endpoints, secrets and deliveries."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from web.schemas.base import RequestModel, ResponseModel

JobEvent = Literal["job.succeeded", "job.failed", "job.cancelled", "job.expired"]
WebhookEvent = Literal[
    "job.succeeded",
    "job.failed",
    "job.cancelled",
    "job.expired",
    "batch.completed",
    "batch.failed",
    "batch.expired",
    "batch.cancelled",
    "response.completed",
    "response.incomplete",
    "response.failed",
    "response.cancelled",
]
DeliveryStatusName = Literal["pending", "delivered", "dead"]
Url = Annotated[str, Field(min_length=1, max_length=2048)]


class EndpointRequest(RequestModel):
    """An endpoint to register."""

    url: Url = Field(
        description="Where webhooks are sent with POST: http(s), with public addresses unless WEBHOOK_NETWORKS allows "
        "others"
    )
    events: list[WebhookEvent] = Field(
        min_length=1,
        max_length=32,
        description="The types of events to send, for jobs, batches and background responses of all API keys",
    )
    description: str = Field("", max_length=256)


class RotationRequest(RequestModel):
    """How to replace a secret."""

    overlap_s: float = Field(
        24 * 3600.0,
        ge=0,
        le=30 * 24 * 3600,
        description="Seconds for which webhooks are also signed with the earlier secret",
    )


class SecretView(ResponseModel):
    """A secret. Keep it private: who knows it can forge webhooks."""

    secret: str = Field(description="The current secret, in the format of the Standard Webhooks specification")
    earlier: int = Field(description="Number of earlier secrets with which webhooks are still signed")


class EndpointView(ResponseModel):
    """A registered endpoint."""

    id: str
    object: Literal["webhook_endpoint"] = "webhook_endpoint"
    url: str
    events: list[str]
    description: str
    created_at: float


class NewEndpointView(EndpointView):
    """A new endpoint, with its secret."""

    secret: str = Field(description="The secret. Only this response and that to a rotation contain it")


class EndpointList(ResponseModel):
    """All endpoints."""

    object: Literal["list"] = "list"
    data: list[EndpointView]


class DeliveryView(ResponseModel):
    """One event for one receiver. Times are in seconds since the epoch."""

    id: str = Field(description="The `webhook-id`, the same in all attempts")
    object: Literal["webhook_delivery"] = "webhook_delivery"
    event_id: str
    type: str = Field(description="Type of the event")
    object_id: str = Field(description="Id of the job or batch")
    endpoint_id: str | None = Field(description="The registered endpoint; null for the `webhook_url` of a job")
    url: str
    status: DeliveryStatusName = Field(description="`dead`: all attempts have failed; it can be sent again")
    attempts: int
    created_at: float
    next_attempt_at: float | None
    ended_at: float | None
    last_status: int | None = Field(description="HTTP status of the last response")
    last_error: str | None


class DeliveryList(ResponseModel):
    """Deliveries, newest first."""

    object: Literal["list"] = "list"
    data: list[DeliveryView]
