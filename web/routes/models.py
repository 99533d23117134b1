"""`/inference/models`, loading and unloading."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from flask import Blueprint, Response
from pydantic import BaseModel

from shared.models.catalog import CatalogModel
from shared.models.operations import Operation
from shared.models.registry import WorkerInfo
from web.access.auth import caller, require_scope
from web.admission.model_choice import usable_adapters
from web.cluster.snapshot import ClusterSnapshot
from web.http.openapi import describe
from web.http.request import read_body
from web.schemas.models import (
    AdapterView,
    BatchingView,
    LoadRequest,
    ModelList,
    ModelState,
    ModelView,
    ModelWorkerView,
    OperationError,
    OperationList,
    OperationView,
    UnloadRequest,
)
from web.services import services

routes = Blueprint("models", __name__)

_BEST_FIRST: Final[tuple[ModelState, ...]] = ("warm", "loading", "draining")
_STATES: Final[Mapping[str, ModelState]] = {"ready": "warm", "draining": "draining"}
"""Model states by worker state. Other states, including those of newer versions, count as `loading`: the worker takes
no jobs."""


@routes.route("/inference/models", methods=["GET", "POST"])
@describe("List models", responses={200: ModelList})
def list_models() -> Response:
    """The models of the catalog, and those that workers have or jobs wait for. The default model comes first.

    POST is the same as GET and ignores the body, for clients that can only send POST. Invalid entries of the catalog
    are reported only to API keys with the scope `admin`.
    """
    # They contain paths of this machine.
    faults = services().catalog.faults if "admin" in caller().scopes else ()
    return _json(ModelList(data=model_views(), faults=list(faults)))


@routes.post("/inference/load_model")
@describe("Load a model", body=LoadRequest, responses={202: OperationView}, errors=(400, 404, 413, 415, 422))
def load_model() -> Response:
    """Needs the scope `admin`. Starts loading and returns an operation; its path is in the `Location` header.

    If the worker has too little free memory, it first unloads the least recently used models that are not pinned, after
    their running jobs have had time to end. If loading fails, the previous models stay loaded or are loaded again.
    """
    require_scope("admin")
    body = read_body(LoadRequest)
    operation = services().model_manager.load(body.model, body.worker, replace=body.mode == "replace", pin=body.pin)
    return accepted(operation)


@routes.post("/inference/unload_model")
@describe("Unload a model", body=UnloadRequest, responses={202: OperationView}, errors=(400, 404, 413, 415, 422))
def unload_model() -> Response:
    """Needs the scope `admin`. Starts unloading and returns an operation; its path is in the `Location` header.

    Running jobs have as long to end as at a shutdown. Then they return to the queue and wait for the model.
    """
    require_scope("admin")
    body = read_body(UnloadRequest)
    return accepted(services().model_manager.unload(body.model, body.worker))


@routes.get("/inference/operations")
@describe("List operations", responses={200: OperationList})
def list_operations() -> Response:
    """Needs the scope `admin`. The operations of the last 24 hours, newest first."""
    require_scope("admin")
    return _json(OperationList(data=[operation_view(each) for each in services().model_manager.recent()]))


@routes.get("/inference/operations/<operation_id>")
@describe("Get an operation", responses={200: OperationView}, errors=(404,))
def get_operation(operation_id: str) -> Response:
    """Needs the scope `admin`. The state of the loading, unloading or download of a model."""
    require_scope("admin")
    return _json(operation_view(services().model_manager.get(operation_id)))


def model_views() -> list[ModelView]:
    """Return all models, the default one first."""
    current = services()
    # The latest state: a client that has just seen a load succeed must not read that the model is cold.
    snapshot, catalog = current.cluster.snapshot(max_age_s=0), current.catalog
    names = sorted({*snapshot.models, *catalog.models}, key=lambda name: (name != catalog.default, name))
    return [
        _model_view(name, snapshot, catalog.models.get(name), default=name == catalog.default, waiting=waiting)
        for name, waiting in zip(names, current.registry.waiting_each(names), strict=True)
        if waiting or name in catalog.models or snapshot.has(name)  # others were only served in the past
    ]


def _model_view(
    name: str, snapshot: ClusterSnapshot, entry: CatalogModel | None, *, default: bool, waiting: int
) -> ModelView:
    card = snapshot.models.get(name)
    workers = [worker for worker in snapshot.workers if worker.model == name]
    unloaded: ModelState = "cold" if entry else "absent"
    states = {_state(worker) for worker in workers}
    kind = card.kind if card else entry.declared_kind if entry else None
    adapters = usable_adapters(entry, card, loaded=bool(workers))
    return ModelView(
        id=name,
        adapters=[AdapterView(name=each, problem=problem or None) for each, problem in sorted(adapters.items())],
        aliases=list(entry.aliases) if entry else [],
        kind=kind,
        text_only=card.text_only if card else entry is not None and entry.text_only,
        context=card.context if card else entry.context_limit if entry else None,
        default=default,
        state=next((state for state in _BEST_FIRST if state in states), unloaded),
        workers=[_worker_view(worker) for worker in workers],
        slots=sum(worker.slots for worker in workers),
        slots_used=sum(worker.slots_used for worker in workers),
        waiting=waiting,
        memory_bytes=round(_max_stat(workers, "model_bytes")) or (entry.weights_bytes if entry else 0) or None,
        load_s=round(_max_stat(workers, "load_s"), 3) or None,
        tokens_per_s=round(sum(worker.stats.get("tokens_per_s", 0.0) for worker in workers), 1),
    )


def _state(worker: WorkerInfo) -> ModelState:
    return _STATES.get(worker.state, "loading")


def _worker_view(worker: WorkerInfo) -> ModelWorkerView:
    stats = worker.stats
    return ModelWorkerView(
        worker=worker.node,
        state=_state(worker),
        slots=worker.slots,
        slots_used=worker.slots_used,
        pinned=bool(stats.get("pinned")),
        progress=stats.get("load_progress", 1.0),
        memory_bytes=round(stats.get("model_bytes", 0)),
        load_s=round(stats.get("load_s", 0.0), 3),
        unused_s=round(stats.get("unused_s", 0.0), 1),
        tokens_per_s=round(stats.get("tokens_per_s", 0.0), 1),
        batching=BatchingView(**batching) if (batching := worker.about.get("batching")) else None,
    )


def _max_stat(workers: Sequence[WorkerInfo], name: str) -> float:
    return max((worker.stats.get(name, 0.0) for worker in workers), default=0.0)


def operation_view(operation: Operation) -> OperationView:
    """Return an operation as the API shows it."""
    error = None
    if operation.error_code:
        error = OperationError(code=operation.error_code, message=operation.error_message or "")
    return OperationView(
        id=operation.id,
        kind=operation.kind,
        model=operation.model,
        worker=operation.node,
        state=operation.state,
        progress=operation.progress,
        unloaded=list(operation.unloaded),
        memory_before=operation.memory_before,
        memory_after=operation.memory_after,
        source=operation.source,
        bytes_done=operation.bytes_done,
        bytes_total=operation.bytes_total,
        created_at=operation.created_at,
        updated_at=operation.updated_at,
        error=error,
    )


def accepted(operation: Operation) -> Response:
    """Return an operation that was started, with its path in the header `Location`."""
    response = _json(operation_view(operation), 202)
    response.headers["Location"] = f"/inference/operations/{operation.id}"
    return response


def _json(view: BaseModel, status: int = 200) -> Response:
    return Response(view.model_dump_json(), status, content_type="application/json")
