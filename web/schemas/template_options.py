"""Options for chat templates and for the logits, which only some models support or which depend on the vocabulary."""

from __future__ import annotations

import json
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, Field, StringConstraints
from pydantic_core import PydanticCustomError

from shared.tokenizing.messages import RESERVED_VARIABLES

MAX_VARIABLES: Final = 64
MAX_VARIABLES_BYTES: Final = 64 * 2**10
MAX_BIASES: Final = 1024

ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


def _check_variables(variables: dict[str, Any]) -> dict[str, Any]:
    for name in variables:
        if name in RESERVED_VARIABLES or name.endswith("_token"):
            message = "{name} cannot be set: the service sets it"
            raise PydanticCustomError("reserved_variable", message, {"name": name})
    if len(json.dumps(variables).encode()) > MAX_VARIABLES_BYTES:
        message = "All variables together can have at most {limit} bytes as JSON"
        raise PydanticCustomError("variables_too_long", message, {"limit": MAX_VARIABLES_BYTES})
    return variables


TemplateVariables = Annotated[
    dict[Annotated[str, StringConstraints(pattern=r"^[A-Za-z][A-Za-z0-9_]{0,63}$")], Any],
    Field(max_length=MAX_VARIABLES),
    AfterValidator(_check_variables),
]


def check_no_conflict(name: str, value: Any, variables: dict[str, Any]) -> None:
    """Raise an error if a field differs from the template variable of the same name."""
    if value is not None and variables.get(name, value) != value:
        message = "{name} differs from chat_template_kwargs.{name}; send only one of them"
        raise PydanticCustomError("conflicting_values", message, {"name": name})


LogitBias = Annotated[
    dict[
        Annotated[str, StringConstraints(pattern=r"^[0-9]{1,9}$")],
        Annotated[float, Field(ge=-100, le=100)],
    ],
    Field(max_length=MAX_BIASES),
]


AdapterName = Annotated[
    str | None,
    Field(
        min_length=1,
        max_length=128,
        description="Name of a LoRA adapter of the model; `GET /inference/models` lists them. `model` may name it "
        "instead, as `model:adapter`",
    ),
]
