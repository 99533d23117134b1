"""The pages, except those for signing in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, get_args

import redis
from flask import request, send_from_directory
from flask_limiter import RateLimitExceeded
from werkzeug.exceptions import HTTPException
from werkzeug.wrappers import Response as AnyResponse

from shared.errors import MlxqError, NotFound
from shared.models.folder import INPUT_KINDS
from web.access.auth import caller, is_admin
from web.batches.store import Batch
from web.console.layout import STATIC, page, page_description, render, routes, static_version
from web.http import problems
from web.routes.keys import key_view
from web.routes.models import model_views
from web.routes.overview import overview
from web.schemas.batches import BatchEndpoint
from web.schemas.webhooks import WebhookEvent
from web.services import services
from web.webhooks.deliveries import DeliveryStatus

_MAX_BATCHES: Final = 100
_MAX_DELIVERIES: Final = 50


@routes.get("/")
@page_description("Show the overview")
@page
def overview_page() -> AnyResponse:
    """Queues, workers, throughput and latencies."""
    return render("overview", "overview", view=overview(), health=services().health_checker.check(ping=False))


@routes.get("/console/playground")
@page_description("Show the playground")
@page
def playground_page() -> AnyResponse:
    """A conversation with a model."""
    models = [view for view in model_views() if view.kind not in INPUT_KINDS]
    return render("playground", "playground", models=models, default=services().catalog.default)


@routes.get("/console/models")
@page_description("Show the models")
@page
def models_page() -> AnyResponse:
    """The models, the memory of the workers, and running operations."""
    current = services()
    return render(
        "models",
        "models",
        models=model_views(),
        hosts=current.registry.hosts(),
        operations=current.model_manager.recent()[:10] if is_admin() else [],
        added={name: current.catalog_updates.known.aliases_of(name) for name in current.catalog.models},
        downloaded=current.catalog_updates.known.models,
        catalog_ids=frozenset(current.catalog.models),
        faults=current.catalog.faults if is_admin() else (),
    )


@routes.get("/console/batches")
@page_description("Show the batches")
@page
def batches_page() -> AnyResponse:
    """Batches and their progress."""
    return render("batches", "batches", batches=_batches(), endpoints=get_args(BatchEndpoint), key_names=key_names())


@routes.get("/console/webhooks")
@page_description("Show the webhooks")
@page
def webhooks_page() -> AnyResponse:
    """Endpoints, and deliveries that failed or wait."""
    current, owner = services(), None if is_admin() else caller().id
    return render(
        "webhooks",
        "webhooks",
        endpoints=current.receivers.endpoints() if is_admin() else [],
        events=get_args(WebhookEvent),
        dead=current.deliveries.list(DeliveryStatus.DEAD, owner, _MAX_DELIVERIES),
        pending=current.deliveries.list(DeliveryStatus.PENDING, owner, _MAX_DELIVERIES),
    )


@routes.get("/console/keys")
@page_description("Show the API keys")
@page
def keys_page() -> AnyResponse:
    """All API keys, or only the caller's."""
    entries = services().keys.list() if is_admin() else [caller()]
    ordered = sorted(entries, key=lambda entry: (entry.revoked_at is not None, entry.created_at))
    return render("keys", "keys", keys=[key_view(entry) for entry in ordered])


@routes.get("/console/static/<version>/<path:name>")
@page_description("Get a file of the console")
def static_file(version: str, name: str) -> AnyResponse:
    """Scripts and style sheets. Their addresses contain a hash, so they can be cached."""
    current = version == static_version()
    response = send_from_directory(STATIC, name, max_age=31_536_000 if current else 0)
    if current:
        response.cache_control.immutable = True
    return response


@routes.get("/console/")
@routes.get("/console/<path:_unknown>")
@page_description("Show that there is no such page")
@page
def no_page(_unknown: str = "") -> AnyResponse:
    """An error page instead of the API's answer."""
    raise NotFound("There is no such page.")


@routes.errorhandler(MlxqError)
@routes.errorhandler(redis.RedisError)
@routes.errorhandler(RateLimitExceeded)
@routes.errorhandler(HTTPException)
@routes.errorhandler(Exception)
def error_page(error: Exception) -> AnyResponse:
    """Show an error as a page, with the same status, headers and log line as the API's answer."""
    answer = problems.answer(error)
    if answer.status_code == 404 and request.path == "/":
        return answer
    body = answer.get_json(force=True)
    shown = render("error", "", answer.status_code, title=body["title"], detail=body["detail"], code=body["code"])
    for name in ("Retry-After", "Allow"):
        if name in answer.headers:
            shown.headers[name] = answer.headers[name]
    return shown


def key_names() -> Mapping[str, str]:
    """Return the names of API keys by id: of all, or only of the caller's."""
    if not is_admin():
        return {caller().id: caller().name}
    return {key_id: key.name for key_id, key in services().keys.entries().items()}


def _batches() -> list[Batch]:
    """Return the newest batches that the caller may see. Their ids sort by time, unless they came with a key."""
    store, owners = services().batches, key_names()
    ids = [batch_id for owner in owners for batch_id in store.ids(owner)[:_MAX_BATCHES]]
    newest = sorted(store.read(ids), key=lambda batch: batch.created_at, reverse=True)
    return newest[:_MAX_BATCHES]
