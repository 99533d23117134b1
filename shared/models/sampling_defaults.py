"""Sampling parameters for requests that leave them out."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from shared.models.facts import declared_sampling


class SamplingDefaults(BaseModel):
    """Defaults for requests. The names are those of request fields."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)

    @classmethod
    def declared(cls, folder: Path) -> SamplingDefaults:
        """Return the parameters that a model's files declare, without invalid ones."""
        return cls.of(declared_sampling(folder))

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> SamplingDefaults:
        """Return some parameters without invalid ones, and without those that only newer versions know."""
        valid: dict[str, Any] = {}
        for name, value in values.items():
            with suppress(ValidationError):
                valid |= cls.model_validate({name: value}).model_dump(exclude_none=True)
        return cls(**valid)

    def over(self, other: SamplingDefaults) -> SamplingDefaults:
        """Return these defaults, and those of `other` for parameters that have none here."""
        return other.model_copy(update=self.model_dump(exclude_none=True))
