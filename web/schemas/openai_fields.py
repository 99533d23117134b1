"""Types of fields that several routes of OpenAI's API have.

Every field of OpenAI's is in one of three groups. Most are supported. Advisory ones (`Advice`) cannot change an answer
and have no effect. Those that would change the answer, and are not supported (`Unsupported`), are refused.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal, NoReturn, TypeAlias

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from shared.jobs.record import Priority
from web.schemas.base import RequestModel
from web.schemas.requests import Metadata, Stop

_ADVICE: Final = "Accepted; has no effect"
_UNSUPPORTED: Final = "Not supported: refused unless it is null"


def refuse(_: Any) -> NoReturn:
    """Refuse a value of a field that is not supported."""
    raise PydanticCustomError("unsupported_parameter", "This service does not support the parameter")


Advice: TypeAlias = Annotated[Any, Field(description=_ADVICE)]
Unsupported: TypeAlias = Annotated[None, BeforeValidator(refuse), Field(description=_UNSUPPORTED)]

ServiceTier: TypeAlias = Literal["auto", "default", "flex", "scale", "priority", "fast", "ultrafast"]
_MAX_SEED: Final = 2**63
_SMALL_TOP_P: Final = 1e-9
"""In place of 0, which job requests do not allow: only the most likely token remains."""
_SAME: Final = ("temperature", "top_k", "min_p", "stop", "metadata")
_TIERS: Final = {Priority.HIGH: "priority", Priority.NORMAL: "default", Priority.BATCH: "flex"}


def _priority_of_tier(tier: ServiceTier, highest: Priority) -> str | None:
    """Return the priority that a service tier stands for; None for the default.

    Args:
        highest: the highest priority that the API key may use.
    """
    if tier == "flex":
        return Priority.BATCH.label
    return highest.label if tier in ("priority", "fast", "ultrafast") else None


def tier_of_priority(priority: Priority) -> str:
    """Return the service tier that a priority stands for."""
    return _TIERS[priority]


class SampledRequest(RequestModel):
    """The fields of all requests that generate text."""

    temperature: float | None = Field(None, ge=0, le=2, description="Default: the model's, then the service's")
    top_p: float = Field(1.0, ge=0, le=1)
    top_k: int = Field(0, ge=0, le=2**31 - 1, description="Sample from this many most likely tokens; 0 for all")
    min_p: float = Field(
        0.0, ge=0, le=1, description="Minimum probability of a token, relative to that of the most likely token"
    )
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop = Field([])
    stream: bool = False
    metadata: Metadata = Field({}, description="Strings that are stored and returned with the job")
    service_tier: ServiceTier = Field(
        "auto",
        description="`flex`: the lowest priority; `priority`, `fast` or `ultrafast`: the highest that the API key may "
        "use; others: normal priority",
    )

    @field_validator("stream_options", check_fields=False)  # each route has options of its own
    @classmethod
    def _only_in_streams(cls, options: Any, info: ValidationInfo) -> Any:
        if options is not None and not info.data.get("stream"):
            raise PydanticCustomError("no_stream", "stream_options is allowed only if stream is true")
        return options

    def sampling_fields(self, highest: Priority) -> dict[str, Any]:
        """Return the fields of the job request that follow from these.

        Args:
            highest: the highest priority that the API key may use.
        """
        sent = self.model_fields_set  # for other fields, the model can have defaults
        fields: dict[str, Any] = {name: getattr(self, name) for name in _SAME if name in sent}
        if "top_p" in sent:
            fields["top_p"] = max(self.top_p, _SMALL_TOP_P)
        if self.seed is not None:
            fields["seed"] = self.seed % _MAX_SEED
        if priority := _priority_of_tier(self.service_tier, highest):
            fields["priority"] = priority
        return fields
