"""Models, and requests to load and unload them."""

from __future__ import annotations

from typing import Literal

from pydantic import (
    Field,
)

from shared.models.operations import OperationState
from web.schemas.base import RequestModel, ResponseModel

ModelState = Literal["warm", "loading", "draining", "cold", "absent"]


class ModelWorkerView(ResponseModel):
    """What one worker has of a model."""

    worker: str = Field(description="Its name, for `load_model` and `unload_model`")
    state: ModelState
    slots: int
    slots_used: int
    pinned: bool
    progress: float = Field(description="Of the loading, from 0 to 1")
    memory_bytes: int = Field(description="What its weights take")
    load_s: float = Field(description="What its loading took")
    tokens_per_s: float = Field(description="Generated over the last minute")


class ModelView(ResponseModel):
    """A model that requests may name."""

    id: str
    object: Literal["model"] = "model"
    aliases: list[str] = Field(description="Other names for it")
    kind: str | None = Field(description="`text` or `vision`; null: not known")
    context: int | None = Field(description="Most tokens of prompt and answer together; null: not known")
    default: bool
    state: ModelState = Field(
        description="Of its workers, the best. `cold`: none has it; `absent`: nor has the catalog, and jobs wait until "
        "a worker comes that does"
    )
    workers: list[ModelWorkerView]
    slots: int
    slots_used: int
    waiting: int
    memory_bytes: int | None = Field(
        description="What its weights take in a worker; while it is cold, about what they will"
    )
    load_s: float | None = Field(description="What its loading took; null while it is cold")
    tokens_per_s: float = Field(description="Generated over the last minute, by all its workers")


class ModelList(ResponseModel):
    """The models."""

    object: Literal["list"] = "list"
    data: list[ModelView]
    faults: list[str] = Field(
        description="Entries of the catalog that are wrong, by line; they do not serve. Only for the scope `admin`"
    )


class OpenAIModel(ModelView):
    """A model in OpenAI's form, with ours beside it."""

    created: int
    owned_by: str = "mlxq"


class OpenAIModelList(ResponseModel):
    """The models in OpenAI's form."""

    object: Literal["list"] = "list"
    data: list[OpenAIModel]


class LoadRequest(RequestModel):
    """Which model to load, and where."""

    model: str = Field(min_length=1, max_length=256, description="Id or alias of a model of the catalog")
    worker: str | None = Field(None, min_length=1, description="Default: the one with most memory left")
    mode: Literal["beside", "replace"] = Field(
        "beside", description="`replace`: what is warm there and not pinned goes, also where there is memory for both"
    )
    pin: bool = Field(False, description="Never unload it to make place for another")


class UnloadRequest(RequestModel):
    """Which model to let go of, and where."""

    model: str = Field(min_length=1, max_length=256)
    worker: str | None = Field(None, min_length=1, description="Needed where several have it")


class OperationError(ResponseModel):
    """Why an operation failed."""

    code: str = Field(
        description="Stable: `not_enough_memory`, `load_failed`, `model_not_found`, `model_not_loaded`, `worker_lost`, "
        "`worker_silent`, `internal`"
    )
    message: str


class OperationView(ResponseModel):
    """A loading or unloading. Times are seconds since the epoch."""

    id: str
    object: Literal["operation"] = "operation"
    kind: str = Field(description="`load` or `unload`")
    model: str
    worker: str
    state: OperationState
    progress: float = Field(description="Of the loading, from 0 to 1")
    unloaded: list[str] = Field(description="Models that had to make place")
    memory_before: int | None = Field(description="Bytes that the worker's MLX held in use")
    memory_after: int | None
    created_at: float
    updated_at: float
    error: OperationError | None


class OperationList(ResponseModel):
    """Operations, the newest first."""

    object: Literal["list"] = "list"
    data: list[OperationView]
