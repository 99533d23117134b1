"""Errors: RFC 9457 problem details, and OpenAI's envelope."""

from __future__ import annotations

from pydantic import (
    Field,
)

from web.schemas.base import ResponseModel


class Fault(ResponseModel):
    """One of several things wrong with a request."""

    field: str | None
    code: str
    detail: str


class ProblemDetails(ResponseModel):
    """An error (RFC 9457). `code` is stable; `detail` is for people."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    field: str | None = Field(None, description="The field or header at fault")
    errors: list[Fault] | None = Field(None, description="All faults, when a body was checked")
    request_id: str


class OpenAIErrorDetails(ResponseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIError(ResponseModel):
    """An error in OpenAI's form."""

    error: OpenAIErrorDetails
