"""API keys, and the requests that create and change them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from shared.jobs.limits import MAX_LIMIT, MAX_WEIGHT, MIN_WEIGHT
from shared.settings import RATE
from web.schemas.base import RequestModel, ResponseModel
from web.schemas.requests import PriorityName

Scope = Literal["infer", "admin"]


class KeyLimits(RequestModel):
    """What a key may use. A limit that is left out or null is the service's default."""

    rate_limit: str | None = Field(None, pattern=RATE, description="Requests, such as `100/minute`; without reads")
    weight: float = Field(1.0, ge=MIN_WEIGHT, le=MAX_WEIGHT, description="Share of a model, relative to other keys")
    max_queued: int | None = Field(None, ge=1, le=MAX_LIMIT, description="Maximum waiting jobs per model")
    max_queued_bytes: int | None = Field(
        None, ge=1, le=MAX_LIMIT, description="Maximum Redis memory that unfinished jobs may reserve"
    )
    max_running: int | None = Field(
        None, ge=0, le=MAX_LIMIT, description="Maximum running jobs; further ones wait. 0: unlimited"
    )
    tokens_per_minute: int | None = Field(
        None, ge=0, le=MAX_LIMIT, description="Tokens of prompts and answers per minute. 0: unlimited"
    )
    tokens_per_day: int | None = Field(
        None, ge=0, le=MAX_LIMIT, description="Tokens of prompts and answers per day (UTC). 0: unlimited"
    )
    max_priority: PriorityName = Field("normal", description="Highest class that jobs may have")


class KeyRequest(KeyLimits):
    """A key to create."""

    name: str = Field(
        min_length=1, max_length=64, pattern=r"^[^\x00-\x1f\x7f]+$", description="No other key may have it"
    )
    scopes: list[Scope] = Field(["infer"], min_length=1, max_length=2)


class KeyView(ResponseModel):
    """An API key, without the key itself."""

    id: str = Field(description="The public part of the key; it owns the jobs")
    object: Literal["api_key"] = "api_key"
    name: str
    scopes: list[Scope]
    rate_limit: str | None = Field(description="Null for the service's default")
    weight: float
    max_queued: int | None = Field(description="Null for the service's default")
    max_queued_bytes: int | None = Field(description="Null for the service's default")
    max_running: int | None = Field(description="Null for the service's default; 0: unlimited")
    tokens_per_minute: int | None = Field(description="Null for the service's default; 0: unlimited")
    tokens_per_day: int | None = Field(description="Null for the service's default; 0: unlimited")
    max_priority: PriorityName
    created_at: float
    revoked_at: float | None = Field(description="Null for a valid key")


class NewKeyView(KeyView):
    """A key that was just created."""

    key: str = Field(description="The key. It cannot be read again")


class KeyList(ResponseModel):
    """Keys, oldest first."""

    object: Literal["list"] = "list"
    data: list[KeyView]
