"""Error responses: RFC 9457 problem details, and the formats of OpenAI and Anthropic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal, Self

from pydantic import ConfigDict, Field

from shared.errors import MlxqError
from web.schemas.base import ResponseModel

MEDIA_TYPE: Final = "application/problem+json"


class FieldError(ResponseModel):
    """One invalid field of a request body."""

    model_config = ConfigDict(json_schema_serialization_defaults_required=False)

    field: str | None = Field(None, description="Path of the field, for example `messages[0].role`")
    code: str = Field(description="Kind of the validation error")
    detail: str = Field(description="What is wrong, for people")


class ProblemDetails(ResponseModel):
    """An error (RFC 9457). `field` and `errors` are left out if they do not apply."""

    model_config = ConfigDict(json_schema_serialization_defaults_required=False)

    type: str = Field(description="URN of the kind of error")
    title: str = Field(description="Name of the kind of error")
    status: int = Field(description="HTTP status")
    detail: str = Field(description="What is wrong and how to fix it, for people")
    code: str = Field(description="Stable code, for programs")
    field: str | None = Field(None, description="The field, parameter or header that is wrong")
    errors: list[FieldError] | None = Field(None, description="All invalid fields, if the body failed validation")
    request_id: str = Field(description="The request's id, also in the `X-Request-ID` header and in the log")

    @classmethod
    def of(cls, error: MlxqError, request_id: str, field_errors: Sequence[FieldError] = ()) -> Self:
        """Describe an error."""
        return cls(
            type=f"urn:mlxq:problem:{error.code}",
            title=error.title,
            status=error.status,
            detail=error.detail,
            code=error.code,
            field=error.field,
            errors=list(field_errors) or None,
            request_id=request_id,
        )


class OpenAIErrorDetails(ResponseModel):
    """The error itself."""

    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIError(ResponseModel):
    """An error in OpenAI's format."""

    error: OpenAIErrorDetails


class AnthropicErrorDetails(ResponseModel):
    """The error itself."""

    type: str
    message: str


class AnthropicError(ResponseModel):
    """An error in Anthropic's format."""

    type: Literal["error"] = "error"
    error: AnthropicErrorDetails
    request_id: str
