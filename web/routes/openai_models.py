"""`/v1/models`: the models in the format of the OpenAI API."""

from __future__ import annotations

from flask import Blueprint, Response

from shared.errors import NotFound
from web.http.openapi import describe
from web.routes.models import model_views
from web.schemas.models import ModelView, OpenAIModel, OpenAIModelList
from web.services import services

routes = Blueprint("openai_models", __name__)


@routes.get("/v1/models")
@describe("List models (OpenAI format)", responses={200: OpenAIModelList})
def list_openai_models() -> Response:
    """The models of `/inference/models` in OpenAI's format, with all fields of the original in addition."""
    models = OpenAIModelList(data=[_openai_model(view) for view in model_views()])
    return Response(models.model_dump_json(), content_type="application/json")


@routes.get("/v1/models/<model_id>")
@describe("Get a model (OpenAI format)", responses={200: OpenAIModel}, errors=(404,))
def get_openai_model(model_id: str) -> Response:
    """The model with this id or alias."""
    entry = services().catalog.resolve(model_id)
    name = entry.id if entry else model_id
    view = next((view for view in model_views() if view.id == name), None)
    if view is None:
        raise NotFound(f"The model {model_id!r} does not exist", code="model_not_found", field="model")
    return Response(_openai_model(view).model_dump_json(), content_type="application/json")


def _openai_model(view: ModelView) -> OpenAIModel:
    return OpenAIModel(**view.model_dump(exclude={"object"}), created=0)
