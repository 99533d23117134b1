"""Base classes of all request and response models."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

_ANNOTATIONS = ("title", "description", "default")


class RequestModel(BaseModel):
    """Refuses unknown fields, numbers in quotes, NaN and infinity, instead of ignoring or converting them.

    `null` for an optional field is the same as leaving the field out: many clients send all the fields that they know.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        fields = cls.model_fields
        optional = {name for name, field in fields.items() if not field.is_required()}
        return {name: value for name, value in data.items() if value is not None or name not in optional}

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Document that optional fields may be null."""
        documented = handler(schema)
        target = handler.resolve_ref_schema(documented)
        required = target.get("required", ())
        for name, field in target.get("properties", {}).items():
            if name not in required:
                target["properties"][name] = _or_null(field)
        return documented


def _or_null(field: dict[str, Any]) -> dict[str, Any]:
    options = field.get("anyOf")
    if options is None:
        annotations = {name: field[name] for name in _ANNOTATIONS if name in field}
        options = [{name: value for name, value in field.items() if name not in _ANNOTATIONS}]
    else:
        annotations = {name: value for name, value in field.items() if name != "anyOf"}
    null = {"type": "null"}
    return {"anyOf": options if null in options else [*options, null], **annotations}


class ResponseModel(BaseModel):
    """Every field is present in a response, so the schema marks fields with a default as required too."""

    model_config = ConfigDict(json_schema_mode="serialization", json_schema_serialization_defaults_required=True)  # type: ignore[typeddict-unknown-key]
