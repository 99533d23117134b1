"""`/v1/models/downloads` and the aliases of models."""

from __future__ import annotations

from flask import Blueprint, Response

from web.access.auth import require_scope
from web.http.openapi import describe
from web.http.request import read_body
from web.routes.models import accepted, model_views, operation_view
from web.schemas.models import AliasesRequest, DownloadRequest, ModelDeleted, ModelView, OperationList, OperationView
from web.services import services

routes = Blueprint("downloads", __name__, url_prefix="/v1/models")


@routes.get("/downloads")
@describe("List downloads", responses={200: OperationList})
def list_downloads() -> Response:
    """Needs the scope `admin`. The downloads of the last 24 hours, newest first."""
    require_scope("admin")
    views = [operation_view(each) for each in services().model_downloads.recent()]
    return Response(OperationList(data=views).model_dump_json(), content_type="application/json")


@routes.post("/downloads")
@describe("Download a model", body=DownloadRequest, responses={202: OperationView}, errors=(400, 409, 413, 415, 422))
def start_download() -> Response:
    """Needs the scope `admin`. Downloads a model of the hub to a worker's host, and adds it to the catalog.

    Returns an operation; its path is in the `Location` header. A worker downloads one model at a time. Only weights in
    the format safetensors, configuration and tokenizer are downloaded, and each file is verified. A download that was
    interrupted continues when it is started again. Afterwards the model can be loaded.
    """
    require_scope("admin")
    body = read_body(DownloadRequest)
    return accepted(services().model_downloads.start(body.hub, body.revision, body.name, body.worker))


@routes.post("/downloads/<operation_id>/cancel")
@describe("Cancel a download", responses={202: OperationView}, errors=(404,))
def cancel_download(operation_id: str) -> Response:
    """Needs the scope `admin`. Does nothing if the download has ended. What was received is kept for the next one."""
    require_scope("admin")
    return accepted(services().model_downloads.cancel(operation_id))


@routes.delete("/<model_id>")
@describe("Remove a downloaded model", responses={200: ModelDeleted}, errors=(404, 409))
def remove_model(model_id: str) -> Response:
    """Needs the scope `admin`. Removes a model that was downloaded, with its aliases, from the catalog.

    No worker may have it. Its files stay on the disk of the worker's host, so a further download finds them.
    """
    require_scope("admin")
    services().model_downloads.remove(model_id)
    return Response(ModelDeleted(id=model_id).model_dump_json(), content_type="application/json")


@routes.put("/<model_id>/aliases")
@describe("Set aliases", body=AliasesRequest, responses={200: ModelView}, errors=(404, 409, 413, 415))
def set_aliases(model_id: str) -> Response:
    """Needs the scope `admin`. Replaces the aliases of a model, except those in the catalog's file, which stay.

    All processes of the API use them within a second or two.
    """
    require_scope("admin")
    model = services().model_downloads.set_aliases(model_id, read_body(AliasesRequest).aliases)
    view = next(view for view in model_views() if view.id == model.id)
    return Response(view.model_dump_json(), content_type="application/json")
