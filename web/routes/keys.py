"""`/v1/keys`: list, create, limit and revoke API keys."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import cast

from flask import Blueprint, Response, request
from pydantic import BaseModel

from shared.errors import Conflict, Forbidden, Invalid, NotFound
from shared.jobs.limits import OwnerLimits
from shared.jobs.record import Priority
from web.access.api_keys import ApiKey
from web.access.auth import caller, is_admin, require_scope
from web.http import openapi
from web.http.openapi import describe
from web.http.request import read_body
from web.schemas.keys import KeyLimits, KeyList, KeyRequest, KeyView, NewKeyView, Scope
from web.schemas.requests import PriorityName
from web.services import services

routes = Blueprint("keys", __name__, url_prefix="/v1/keys")


@routes.get("")
@describe("List API keys", responses={200: KeyList})
def list_keys() -> Response:
    """All keys with the scope `admin`, including revoked ones; otherwise only the caller's."""
    entries = services().keys.list() if is_admin() else [caller()]
    return _json(KeyList(data=[key_view(entry) for entry in entries]))


@routes.post("")
@describe("Create an API key", body=KeyRequest, responses={201: NewKeyView}, errors=(409, 413, 415))
def create_key() -> Response:
    """Needs the scope `admin`. Only this answer has the key."""
    require_scope("admin")
    body, store = read_body(KeyRequest), services().keys
    try:
        key = store.create(
            body.name,
            body.scopes,
            body.rate_limit,
            limits=OwnerLimits.from_dict(body.model_dump()),
            max_priority=Priority[body.max_priority.upper()],
        )
    except ValueError as error:
        if any(other.name == body.name and other.revoked_at is None for other in store.list()):
            raise Conflict("Another API key has this name.", code="name_taken", field="name") from None
        raise Invalid(f"{error}.") from None
    entry = store.find(key)
    if entry is None:  # revoked already
        raise NotFound("The API key was revoked.", code="key_not_found")
    return _json(NewKeyView(**key_view(entry).model_dump(), key=key), 201)


@routes.put("/<key_id>/limits")
@describe("Set the limits of an API key", body=KeyLimits, responses={200: KeyView}, errors=(404, 413, 415))
def set_limits(key_id: str) -> Response:
    """Needs the scope `admin`. Replaces all limits of the key, from its next request on."""
    require_scope("admin")
    body = read_body(KeyLimits)

    def limited(entry: ApiKey) -> ApiKey:
        return replace(
            entry,
            rate_limit=body.rate_limit,
            limits=OwnerLimits.from_dict(body.model_dump()),
            max_priority=Priority[body.max_priority.upper()],
        )

    _require_known(key_id)
    return _json(key_view(services().keys.change(key_id, limited)))


@routes.delete("/<key_id>")
@describe("Revoke an API key", responses={200: KeyView}, errors=(404, 422), parameters=(openapi.PURGE,))
def revoke_key(key_id: str) -> Response:
    """Needs the scope `admin`. The key is refused from the next request on; its jobs still run.

    With `purge=true`, also of a key that is revoked already, everything that belongs to the key is erased: its jobs,
    which are cancelled, also those in the archive, its responses, files, batches and cached prefixes. The background
    process and the workers do so from now on; workers that are not running do so when they start. The usage stays.

    A key cannot revoke itself.
    """
    require_scope("admin")
    if key_id == caller().id:
        raise Forbidden("An API key cannot revoke itself. Use another one, or scripts/keys.")
    purge = request.args.get("purge", "false")
    if purge not in ("true", "false"):
        raise Invalid("purge must be true or false.", field="purge")
    entry = services().keys.entries().get(key_id)
    if entry is None or (entry.revoked_at is not None and purge == "false"):
        raise NotFound("There is no valid API key with this id.", code="key_not_found")
    if entry.revoked_at is None:
        entry = services().keys.revoke(key_id)
    if purge == "true":
        services().purges.request(key_id)
    return _json(key_view(entry))


def key_view(entry: ApiKey) -> KeyView:
    """Describe a key."""
    return KeyView(
        id=entry.id,
        name=entry.name,
        scopes=cast("list[Scope]", sorted(entry.scopes)),
        rate_limit=entry.rate_limit,
        **asdict(entry.limits),
        max_priority=cast("PriorityName", entry.max_priority.label),
        created_at=entry.created_at,
        revoked_at=entry.revoked_at,
    )


def _require_known(key_id: str) -> None:
    if services().keys.get(key_id) is None:
        raise NotFound("There is no valid API key with this id.", code="key_not_found")


def _json(view: BaseModel, status: int = 200) -> Response:
    return Response(view.model_dump_json(), status, content_type="application/json")
