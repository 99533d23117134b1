"""`/inference/models`: what a request may name as its model, and whether somebody serves it."""

from __future__ import annotations

from typing import Final

from flask import Blueprint, Response

from shared.registry import ModelCard
from web.apidoc import describe
from web.roster import Snapshot
from web.schemas import ModelList, ModelView
from web.services import services

routes = Blueprint("models", __name__)

_BEST_FIRST: Final = ("ready", "loading", "draining")


@routes.route("/inference/models", methods=["GET", "POST"])
@describe("List models", answers={200: ModelList})
def list_models() -> Response:
    """POST does the same, without reading a body: some platforms' clients ask that way."""
    parts = services()
    snapshot, default = parts.roster.now(), parts.settings.model_id
    names = sorted({*snapshot.models, default}, key=lambda name: (name != default, name))
    views = [_view(name, snapshot, default=name == default, waiting=parts.registry.waiting(name)) for name in names]
    return Response(ModelList(data=views).model_dump_json(), content_type="application/json")


def _view(name: str, snapshot: Snapshot, *, default: bool, waiting: int) -> ModelView:
    card: ModelCard | None = snapshot.models.get(name)
    workers = [worker for worker in snapshot.workers if worker.model == name]
    states = {worker.state for worker in workers}
    return ModelView(
        id=name,
        kind=card.kind if card else None,
        context=card.context if card else None,
        default=default,
        state=next((state for state in _BEST_FIRST if state in states), "absent"),
        workers=len(workers),
        slots=sum(worker.slots for worker in workers),
        slots_used=sum(worker.slots_used for worker in workers),
        waiting=waiting,
    )
