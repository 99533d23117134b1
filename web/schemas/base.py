"""Base classes of all request and response models."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class RequestModel(BaseModel):
    """Refuses unknown fields, numbers in quotes, NaN and infinity, instead of ignoring or converting them."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class ResponseModel(BaseModel):
    """Every field is present in a response, so the schema marks fields with a default as required too."""

    model_config = ConfigDict(json_schema_mode="serialization", json_schema_serialization_defaults_required=True)  # type: ignore[typeddict-unknown-key]
