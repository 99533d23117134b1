"""`/inference/models`: what requests may name, and who has it; `load_model`, `unload_model` and their operations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from flask import Blueprint, Response
from pydantic import BaseModel

from shared.models.catalog import CatalogModel
from shared.models.operations import Operation
from shared.models.registry import WorkerInfo
from web.access.auth import caller, require_scope
from web.cluster.snapshot import ClusterSnapshot
from web.http.openapi import describe
from web.http.request import read_body
from web.schemas.models import (
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
"""A worker's state as its model's. One that only a newer worker knows counts as `loading`: it may take no jobs."""


@routes.route("/inference/models", methods=["GET", "POST"])
@describe("List models", answers={200: ModelList})
def list_models() -> Response:
    """All that requests may name: those of the catalog, and those that workers have or jobs wait for.

    POST does the same, without reading a body: some platforms' clients ask that way. What is wrong with the catalog is
    told to keys with the scope `admin`.
    """
    # They name paths of this machine.
    faults = services().catalog.faults if "admin" in caller().scopes else ()
    return _json(ModelList(data=views(), faults=list(faults)))


@routes.post("/inference/load_model")
@describe("Load a model", body=LoadRequest, answers={202: OperationView}, errors=(400, 404, 413, 415, 422))
def load_model() -> Response:
    """Needs the scope `admin`.

    Loads beside what is warm, as far as the memory goes; else the least recently used models that are not pinned drain
    and go first. `Location` is the operation; a load that fails leaves, or puts back, what was there.
    """
    require_scope("admin")
    wanted = read_body(LoadRequest)
    return _accepted(
        services().model_manager.load(wanted.model, wanted.worker, replace=wanted.mode == "replace", pin=wanted.pin)
    )


@routes.post("/inference/unload_model")
@describe("Unload a model", body=UnloadRequest, answers={202: OperationView}, errors=(400, 404, 413, 415, 422))
def unload_model() -> Response:
    """Needs the scope `admin`. What runs is given the time of a shutdown, then it waits for the model again."""
    require_scope("admin")
    wanted = read_body(UnloadRequest)
    return _accepted(services().model_manager.unload(wanted.model, wanted.worker))


@routes.get("/inference/operations")
@describe("List operations", answers={200: OperationList})
def list_operations() -> Response:
    """Those of the last day, the newest first. Needs the scope `admin`."""
    require_scope("admin")
    return _json(OperationList(data=[_operation(each) for each in services().model_manager.recent()]))


@routes.get("/inference/operations/<operation_id>")
@describe("Get an operation", answers={200: OperationView}, errors=(404,))
def get_operation(operation_id: str) -> Response:
    """How a loading or unloading goes, or went. Needs the scope `admin`."""
    require_scope("admin")
    return _json(_operation(services().model_manager.get(operation_id)))


def views() -> list[ModelView]:
    """Every model, the default one first."""
    parts = services()
    # As it is now: whoever has just seen a loading succeed must not be told that the model is cold.
    snapshot, catalog = parts.cluster.now(max_age_s=0), parts.catalog
    names = sorted({*snapshot.models, *catalog.models}, key=lambda name: (name != catalog.default, name))
    return [
        _view(name, snapshot, catalog.models.get(name), default=name == catalog.default, waiting=waiting)
        for name, waiting in zip(names, parts.registry.waiting_each(names), strict=True)
        if waiting or name in catalog.models or snapshot.has(name)  # others were served once
    ]


def _view(
    name: str, snapshot: ClusterSnapshot, entry: CatalogModel | None, *, default: bool, waiting: int
) -> ModelView:
    card = snapshot.models.get(name)
    workers = [worker for worker in snapshot.workers if worker.model == name]
    otherwise: ModelState = "cold" if entry else "absent"
    states = {_state(worker) for worker in workers}
    best = next((state for state in _BEST_FIRST if state in states), otherwise)
    kind = card.kind if card else entry.told_kind if entry else None
    return ModelView(
        id=name,
        aliases=list(entry.aliases) if entry else [],
        kind=kind,
        context=card.context if card else entry.most_tokens if entry else None,
        default=default,
        state=best,
        workers=[_worker(worker) for worker in workers],
        slots=sum(worker.slots for worker in workers),
        slots_used=sum(worker.slots_used for worker in workers),
        waiting=waiting,
        memory_bytes=round(_most(workers, "model_bytes")) or (entry.weights_bytes if entry else 0) or None,
        load_s=round(_most(workers, "load_s"), 3) or None,
        tokens_per_s=round(sum(worker.stats.get("tokens_per_s", 0.0) for worker in workers), 1),
    )


def _state(worker: WorkerInfo) -> ModelState:
    return _STATES.get(worker.state, "loading")


def _worker(worker: WorkerInfo) -> ModelWorkerView:
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
        tokens_per_s=round(stats.get("tokens_per_s", 0.0), 1),
    )


def _most(workers: Sequence[WorkerInfo], name: str) -> float:
    return max((worker.stats.get(name, 0.0) for worker in workers), default=0.0)


def _operation(operation: Operation) -> OperationView:
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
        created_at=operation.created_at,
        updated_at=operation.updated_at,
        error=error,
    )


def _accepted(operation: Operation) -> Response:
    answer = _json(_operation(operation), 202)
    answer.headers["Location"] = f"/inference/operations/{operation.id}"
    return answer


def _json(view: BaseModel, status: int = 200) -> Response:
    return Response(view.model_dump_json(), status, content_type="application/json")
