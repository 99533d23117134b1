"""`/v1/models`: the models as OpenAI's clients list them, with what else there is to know of them."""

from __future__ import annotations

from flask import Blueprint, Response

from web.http.openapi import describe
from web.routes.models import views
from web.schemas.models import ModelView, OpenAIModel, OpenAIModelList
from web.schemas.problems import OpenAIError, OpenAIErrorDetails
from web.services import services

routes = Blueprint("openai_models", __name__)


@routes.get("/v1/models")
@describe("List models (OpenAI)", answers={200: OpenAIModelList})
def list_openai_models() -> Response:
    """As `/inference/models`, in OpenAI's form."""
    found = OpenAIModelList(data=[_model(view) for view in views()])
    return Response(found.model_dump_json(), content_type="application/json")


@routes.get("/v1/models/<model_id>")
@describe("Get a model (OpenAI)", answers={200: OpenAIModel, 404: OpenAIError})
def get_openai_model(model_id: str) -> Response:
    """By its id or an alias; that there is none is told in OpenAI's form."""
    entry = services().catalog.resolve(model_id)
    name = entry.id if entry else model_id
    view = next((view for view in views() if view.id == name), None)
    if view is None:
        details = OpenAIErrorDetails(
            message=f"The model {model_id!r} does not exist",
            type="invalid_request_error",
            param="model",
            code="model_not_found",
        )
        error = OpenAIError(error=details)
        return Response(error.model_dump_json(), 404, content_type="application/json")
    return Response(_model(view).model_dump_json(), content_type="application/json")


def _model(view: ModelView) -> OpenAIModel:
    return OpenAIModel(**view.model_dump(exclude={"object"}), created=0)
