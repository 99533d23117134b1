"""`/v1/files`: upload, list, read and delete the files of batches, in OpenAI's format."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final, cast

from flask import Blueprint, Response, request, send_file

from shared.errors import Invalid
from web.access.auth import caller
from web.files.store import StoredFile
from web.http import openapi
from web.http.disconnect import CONNECTION
from web.http.openapi import describe
from web.http.pages import page_of
from web.http.request import parse_integer
from web.http.uploads import UploadForm, receive_upload
from web.schemas.files import FileDeleted, FileList, FileView, Purpose
from web.services import services

routes = Blueprint("files", __name__, url_prefix="/v1/files")

PURPOSE: Final = "batch"
_PURPOSES: Final = frozenset({PURPOSE, "batch_output"})
_MAX_LIMIT: Final = 10_000
_MAX_NAME: Final = 255
_MIN_LIFETIME_S: Final = 3600
_MAX_LIFETIME_S: Final = 30 * 24 * 3600
_ANCHOR, _SECONDS = "expires_after[anchor]", "expires_after[seconds]"
_FIELDS: Final = frozenset({"purpose", _ANCHOR, _SECONDS})
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f/\\]")
_FORM: Final[Mapping[str, Mapping[str, Any]]] = {
    "file": {"type": "string", "format": "binary", "description": "The file; at most MAX_FILE_BYTES"},
    "purpose": {"type": "string", "enum": [PURPOSE]},
    _ANCHOR: {"type": "string", "enum": ["created_at"]},
    _SECONDS: {
        "type": "integer",
        "minimum": _MIN_LIFETIME_S,
        "maximum": _MAX_LIFETIME_S,
        "description": "Seconds until the file is deleted. At most FILES_RETENTION_S, which is the default",
    },
}


@routes.post("")
@describe(
    "Upload a file",
    responses={200: FileView},
    form=_FORM,
    required=("file", "purpose"),
    errors=(413, 415),
)
def create_file() -> Response:
    """A file for `POST /v1/batches`: one request per line, as JSON.

    Its lines are checked when a batch is created. Files belong to the API key, which has a quota.
    """
    store, owner = services().files, caller().id
    with (
        services().open_responses.open(owner, request.environ.get(CONNECTION)),
        store.upload(owner, request.content_length or 0) as partial,
    ):
        form = receive_upload("file", services().settings.max_file_bytes, partial.write)
        _check_form(form)
        file = store.describe(partial, owner, _name(form), PURPOSE, lifetime_s=_lifetime_s(form))
        store.commit_upload(partial, file)
    return _json(view(file).model_dump_json())


@routes.get("")
@describe(
    "List files",
    responses={200: FileList},
    errors=(404,),
    parameters=(openapi.PAGE_LIMIT, openapi.AFTER, openapi.ORDER, openapi.PURPOSE),
)
def list_files() -> Response:
    """The files of the API key, newest first. To get the next page, pass `last_id` as `after`."""
    purpose, order = request.args.get("purpose"), request.args.get("order", "desc")
    if purpose is not None and purpose not in _PURPOSES:
        raise Invalid(f"purpose must be one of {', '.join(sorted(_PURPOSES))}.", field="purpose")
    if order not in ("asc", "desc"):
        raise Invalid("order must be asc or desc.", field="order")
    limit = parse_integer("limit", request.args.get("limit", str(_MAX_LIMIT)), 1, _MAX_LIMIT)
    files = [file for file in services().files.all_of(caller().id) if purpose in (None, file.purpose)]
    if order == "desc":
        files.reverse()
    page, more = page_of(files, limit, request.args.get("after"))
    body = FileList(
        data=[view(file) for file in page],
        first_id=page[0].id if page else None,
        last_id=page[-1].id if page else None,
        has_more=more,
    )
    return _json(body.model_dump_json())


@routes.get("/<file_id>")
@describe("Get a file's description", responses={200: FileView}, errors=(404,))
def retrieve_file(file_id: str) -> Response:
    """The file without its content."""
    return _json(view(services().files.get(file_id, caller().id)).model_dump_json())


@routes.get("/<file_id>/content")
@describe("Get a file's content", responses={200: "application/octet-stream"}, errors=(404,))
def file_content(file_id: str) -> Response:
    """The content as it was uploaded, or the results of a batch, one per line."""
    file = services().files.get(file_id, caller().id)
    return send_file(services().files.path(file), mimetype="application/octet-stream", etag=False, max_age=0)


@routes.delete("/<file_id>")
@describe("Delete a file", responses={200: FileDeleted}, errors=(404,))
def delete_file(file_id: str) -> Response:
    """A batch that was created with the file continues: it has its own link to the content."""
    services().files.delete(file_id, caller().id)
    return _json(FileDeleted(id=file_id).model_dump_json())


def view(file: StoredFile) -> FileView:
    """Describe a file to its owner."""
    return FileView(
        id=file.id,
        bytes=file.bytes,
        created_at=int(file.created_at),
        expires_at=int(file.expires_at),
        filename=file.filename,
        purpose=cast("Purpose", file.purpose),
    )


def _check_form(form: UploadForm) -> None:
    for name in form.fields:
        if name not in _FIELDS:
            raise Invalid(f"Unknown form field. A form has: file, {', '.join(sorted(_FIELDS))}.", field=name[:64])
    purpose = form.fields.get("purpose")
    if purpose != PURPOSE:
        detail = "purpose is missing." if purpose is None else "This service has no files with this purpose."
        raise Invalid(f"{detail} Use purpose {PURPOSE!r}.", field="purpose")
    if form.fields.get(_ANCHOR, "created_at") != "created_at":
        raise Invalid("The only anchor is created_at.", field=_ANCHOR)


def _name(form: UploadForm) -> str:
    name = form.filename.replace("\\", "/").rsplit("/", 1)[-1]
    return _CONTROL.sub("_", name)[:_MAX_NAME] or "file"


def _lifetime_s(form: UploadForm) -> float | None:
    seconds = form.fields.get(_SECONDS)
    return None if seconds is None else parse_integer(_SECONDS, seconds, _MIN_LIFETIME_S, _MAX_LIFETIME_S)


def _json(body: str) -> Response:
    return Response(body, content_type="application/json")
