"""What all request and response models have in common."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class RequestModel(BaseModel):
    """Strict: a number in quotes, NaN or a field nobody reads is a mistake worth telling."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class ResponseModel(BaseModel):
    """Nothing is left out of a response: a field with a default is always written."""

    model_config = ConfigDict(json_schema_mode="serialization", json_schema_serialization_defaults_required=True)  # type: ignore[typeddict-unknown-key]
