"""Models, and the requests that load, unload and download them and set their aliases."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from shared.models.catalog import HUB_ID, MODEL_NAME
from shared.models.operations import OperationState
from web.schemas.base import RequestModel, ResponseModel

ModelState = Literal["warm", "loading", "draining", "cold", "absent"]


class BatchingView(ResponseModel):
    """How far rows of a model share passes on a worker, as it was measured when the model was loaded."""

    prefill: str = Field(description="Prompts that are processed together: `any`, `equal_lengths` or `one_by_one`")
    decode: str = Field(description="Rows that decode together: `any`, `equal_lengths` or `one_by_one`")
    continues: bool = Field(description="Whether cached prefixes are reused")
    reason: str = Field(description="What was measured, if rows are restricted; empty otherwise")


class ModelWorkerView(ResponseModel):
    """A model on one worker."""

    worker: str = Field(description="Name of the worker, as `load_model` and `unload_model` accept it")
    state: ModelState
    slots: int = Field(description="Maximum jobs that run at the same time")
    slots_used: int = Field(description="Jobs that are running")
    pinned: bool = Field(description="Whether the model is never unloaded to free memory for another")
    progress: float = Field(description="Progress of loading, from 0 to 1")
    memory_bytes: int = Field(description="Size of the weights in memory")
    load_s: float = Field(description="Seconds that loading took")
    unused_s: float = Field(description="Seconds since the model last had a job; 0 while it has one")
    tokens_per_s: float = Field(description="Generated tokens per second over the last minute")
    batching: BatchingView | None = Field(description="How rows share passes; null if not known yet")


class AdapterView(ResponseModel):
    """A LoRA adapter of a model."""

    name: str = Field(description="Name for the field `adapter` of requests")
    problem: str | None = Field(description="Why the model cannot use it; null if it can")


class ModelView(ResponseModel):
    """A model that requests can name."""

    id: str
    object: Literal["model"] = "model"
    aliases: list[str] = Field(description="Other names that requests can use")
    adapters: list[AdapterView] = Field(description="Adapters that requests can name")
    kind: str | None = Field(
        description="`text`, `vision`, `embedding` (`/v1/embeddings`) or `rerank` (`/v1/rerank`); null if unknown"
    )
    text_only: bool = Field(
        description="Whether the model's folder also has an image encoder, which is not used: images are refused"
    )
    context: int | None = Field(
        description="Maximum tokens of prompt and output together, or of an input; null if unknown"
    )
    default: bool = Field(description="Whether requests that name no model use this one")
    state: ModelState = Field(
        description="The best state among its workers: `warm` (ready for jobs), `loading` or `draining`. `cold`: no "
        "worker has loaded it. `absent`: it is not in the catalog either; its jobs wait for a worker that has it"
    )
    workers: list[ModelWorkerView]
    slots: int = Field(description="Maximum jobs that run at the same time, on all workers")
    slots_used: int = Field(description="Jobs that are running, on all workers")
    waiting: int = Field(description="Jobs in the queue")
    memory_bytes: int | None = Field(
        description="Size of the weights in a worker's memory; estimated from the files if the model is cold"
    )
    load_s: float | None = Field(description="Seconds that loading took; null if the model is cold")
    tokens_per_s: float = Field(description="Generated tokens per second over the last minute, on all workers")


class ModelList(ResponseModel):
    """All models."""

    object: Literal["list"] = "list"
    data: list[ModelView]
    faults: list[str] = Field(
        description="Invalid entries of the catalog, with their line; these models are not available. Empty unless the "
        "API key has the scope `admin`"
    )


class OpenAIModel(ModelView):
    """A model in the formats of OpenAI and of Anthropic, with the fields of `ModelView` in addition."""

    parent: str | None = Field(None, description="For a model with an adapter, `model:adapter`: id of the model")
    created: int = Field(
        description="When the model's files were written, in seconds since the epoch. If they are not on the API's "
        "host: when a worker loaded the model; 0 if none has it"
    )
    owned_by: str = "mlxq"
    type: Literal["model"] = "model"
    display_name: str = Field(description="The same as `id`")
    created_at: str = Field(description="`created` as an RFC 3339 timestamp")
    max_input_tokens: int | None = Field(description="The same as `context`")
    lifecycle: Literal["active"] = "active"


class OpenAIModelList(ResponseModel):
    """All models in the formats of OpenAI and of Anthropic."""

    object: Literal["list"] = "list"
    data: list[OpenAIModel]
    has_more: Literal[False] = Field(False, description="The list always has all models")
    first_id: str | None = Field(description="Id of the first model")
    last_id: str | None = Field(description="Id of the last model")


class LoadRequest(RequestModel):
    """A model to load on a worker."""

    model: str = Field(min_length=1, max_length=256, description="Id or alias of a model in the catalog")
    worker: str | None = Field(
        None, min_length=1, description="Name of the worker. Default: the worker with the most free memory"
    )
    mode: Literal["beside", "replace"] = Field(
        "beside",
        description="`beside`: unload other models only if memory is needed; `replace`: always unload the worker's "
        "other models, except pinned ones",
    )
    pin: bool | None = Field(
        None,
        description="Whether the model stays loaded when another needs memory, and when nothing uses it. Null: as it "
        "is, or as the catalog says",
    )


class UnloadRequest(RequestModel):
    """A model to unload from a worker."""

    model: str = Field(min_length=1, max_length=256, description="Id or alias of a model")
    worker: str | None = Field(
        None, min_length=1, description="Name of the worker; required if several workers have the model"
    )


class DownloadRequest(RequestModel):
    """A model to download from the Hugging Face hub."""

    hub: str = Field(pattern=HUB_ID, max_length=256, description="Id of the repository: `organisation/name`")
    revision: str | None = Field(
        None, pattern=r"^\w[\w./-]*$", max_length=256, description="Branch, tag or commit. Default: the default branch"
    )
    name: str | None = Field(
        None,
        pattern=MODEL_NAME,
        description="Id of the model in this service, and name of its folder. Default: the repository's name",
    )
    worker: str | None = Field(
        None, min_length=1, description="Name of a worker on the host to download to. Default: any worker"
    )


class AliasesRequest(RequestModel):
    """The aliases of a model."""

    aliases: list[Annotated[str, Field(pattern=MODEL_NAME)]] = Field(
        max_length=64, description="Other names that requests can use, in addition to those in the catalog's file"
    )


class ModelDeleted(ResponseModel):
    """A model that was removed from the catalog, in OpenAI's form."""

    id: str
    object: Literal["model"] = "model"
    deleted: Literal[True] = True


class OperationError(ResponseModel):
    """Why an operation failed."""

    code: str = Field(
        description="Stable code: `not_enough_memory`, `load_failed`, `model_not_found`, `model_not_loaded`, "
        "`worker_lost`, `worker_silent`, `download_failed`, `internal`"
    )
    message: str = Field(description="The reason, for people")


class OperationView(ResponseModel):
    """The loading, unloading or download of a model. Times are in seconds since the epoch."""

    id: str
    object: Literal["operation"] = "operation"
    kind: str = Field(description="`load`, `unload` or `download`")
    model: str
    worker: str
    state: OperationState
    progress: float = Field(description="Progress of loading or of the download, from 0 to 1")
    unloaded: list[str] = Field(description="Models that were unloaded to free memory")
    memory_before: int | None = Field(description="Bytes of MLX memory in use on the worker before the operation")
    memory_after: int | None = Field(description="Bytes of MLX memory in use on the worker after the operation")
    source: str | None = Field(description="Of a download: the repository, and the revision after an `@`")
    bytes_done: int | None = Field(description="Of a download: bytes that have been received")
    bytes_total: int | None = Field(description="Of a download: bytes of all files")
    created_at: float
    updated_at: float
    error: OperationError | None


class OperationList(ResponseModel):
    """Operations of the last 24 hours, newest first."""

    object: Literal["list"] = "list"
    data: list[OperationView]
