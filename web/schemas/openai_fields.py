"""Types of fields that several routes of OpenAI's API have.

Every field of OpenAI's is in one of three groups. Most are supported. Advisory ones (`Advice`) cannot change an answer
and have no effect. Those that would change the answer, and are not supported (`Unsupported`), are refused.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal, NoReturn, TypeAlias

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from shared.jobs.record import Priority

_ADVICE: Final = "Accepted; has no effect"
_UNSUPPORTED: Final = "Not supported: refused unless it is null"


def refuse(_: Any) -> NoReturn:
    """Refuse a value of a field that is not supported."""
    raise PydanticCustomError("unsupported_parameter", "This service does not support the parameter")


Advice: TypeAlias = Annotated[Any, Field(description=_ADVICE)]
Unsupported: TypeAlias = Annotated[None, BeforeValidator(refuse), Field(description=_UNSUPPORTED)]

ServiceTier: TypeAlias = Literal["auto", "default", "flex", "scale", "priority", "fast", "ultrafast"]
_TIERS: Final = {Priority.HIGH: "priority", Priority.NORMAL: "default", Priority.BATCH: "flex"}


def priority_of_tier(tier: ServiceTier, highest: Priority) -> str | None:
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
