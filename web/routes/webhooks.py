"""`/v1/webhooks`: endpoints, secrets and deliveries."""

from __future__ import annotations

from flask import Blueprint, Response, request
from pydantic import BaseModel

from shared.errors import Invalid
from web.access.auth import caller, require_scope
from web.http import openapi
from web.http.openapi import describe
from web.http.request import parse_integer, read_body
from web.schemas.webhooks import (
    DeliveryList,
    DeliveryView,
    EndpointList,
    EndpointRequest,
    EndpointView,
    NewEndpointView,
    RotationRequest,
    SecretView,
)
from web.services import services
from web.webhooks.deliveries import Delivery, DeliveryStatus
from web.webhooks.receivers import Endpoint
from web.webhooks.signing import Secret

routes = Blueprint("webhooks", __name__, url_prefix="/v1/webhooks")

_LISTED = (DeliveryStatus.PENDING, DeliveryStatus.DEAD)
_DEFAULT_LIMIT, _MAX_LIMIT = 20, 100


@routes.post("")
@describe("Register a webhook endpoint", body=EndpointRequest, responses={201: NewEndpointView}, errors=(409, 413, 415))
def register_endpoint() -> Response:
    """Needs the scope `admin`. The endpoint receives events of the jobs and batches of all API keys."""
    require_scope("admin")
    body = read_body(EndpointRequest)
    services().webhook_urls.check(body.url, "url", caller().id)
    endpoint = services().receivers.register(body.url, body.events, body.description)
    secret = endpoint.secrets[0].text
    return _json(NewEndpointView(**_endpoint(endpoint).model_dump(), secret=secret), 201)


@routes.get("")
@describe("List webhook endpoints", responses={200: EndpointList})
def list_endpoints() -> Response:
    """All endpoints, oldest first. Needs the scope `admin`."""
    require_scope("admin")
    return _json(EndpointList(data=[_endpoint(each) for each in services().receivers.endpoints()]))


@routes.get("/<endpoint_id>")
@describe("Get a webhook endpoint", responses={200: EndpointView}, errors=(404,))
def get_endpoint(endpoint_id: str) -> Response:
    """The endpoint without its secret. Needs the scope `admin`."""
    require_scope("admin")
    return _json(_endpoint(services().receivers.get(endpoint_id)))


@routes.delete("/<endpoint_id>")
@describe("Remove a webhook endpoint", responses={204: None}, errors=(404,))
def remove_endpoint(endpoint_id: str) -> Response:
    """Deliveries that wait are given up. Needs the scope `admin`."""
    require_scope("admin")
    services().receivers.remove(endpoint_id)
    return Response(status=204)


@routes.post("/<endpoint_id>/rotate")
@describe(
    "Replace the secret of a webhook endpoint",
    body=RotationRequest,
    responses={200: NewEndpointView},
    errors=(404, 413, 415),
)
def rotate_endpoint(endpoint_id: str) -> Response:
    """For `overlap_s`, webhooks have signatures with both secrets. Needs the scope `admin`."""
    require_scope("admin")
    endpoint = services().receivers.rotate(endpoint_id, read_body(RotationRequest).overlap_s)
    return _json(NewEndpointView(**_endpoint(endpoint).model_dump(), secret=endpoint.secrets[0].text))


@routes.get("/secret")
@describe("Get the secret for webhooks of own jobs", responses={200: SecretView})
def key_secret() -> Response:
    """Webhooks to the `webhook_url` of the API key's jobs are signed with it."""
    return _json(_secret(services().receivers.key_secrets(caller().id)))


@routes.post("/secret/rotate")
@describe(
    "Replace the secret for webhooks of own jobs",
    body=RotationRequest,
    responses={200: SecretView},
    errors=(413, 415),
)
def rotate_key_secret() -> Response:
    """For `overlap_s`, webhooks have signatures with both secrets."""
    overlap_s = read_body(RotationRequest).overlap_s
    return _json(_secret(services().receivers.rotate_key_secrets(caller().id, overlap_s)))


@routes.get("/deliveries")
@describe(
    "List webhook deliveries",
    responses={200: DeliveryList},
    parameters=(openapi.LIMIT, openapi.DELIVERY_STATUS),
)
def list_deliveries() -> Response:
    """Deliveries that are dead or wait for their next attempt, newest first.

    A key with the scope `admin` sees all deliveries, another one those to the `webhook_url` of its own jobs.
    """
    limit = parse_integer("limit", request.args.get("limit", str(_DEFAULT_LIMIT)), 1, _MAX_LIMIT)
    status = request.args.get("status", DeliveryStatus.DEAD.value)
    if status not in _LISTED:
        raise Invalid("status must be dead or pending.", field="status")
    found = services().deliveries.list(DeliveryStatus(status), _visible_to(), limit)
    return _json(DeliveryList(data=[_delivery(each) for each in found]))


@routes.get("/deliveries/<delivery_id>")
@describe("Get a webhook delivery", responses={200: DeliveryView}, errors=(404,))
def get_delivery(delivery_id: str) -> Response:
    """Delivered ones are kept for a day, dead ones for 30 days."""
    return _json(_delivery(services().deliveries.get(delivery_id, _visible_to())))


@routes.post("/deliveries/<delivery_id>/resend")
@describe("Send a dead webhook again", responses={202: DeliveryView}, errors=(404, 409))
def resend_delivery(delivery_id: str) -> Response:
    """It has all attempts again, under the same `webhook-id`."""
    delivery = services().deliveries.get(delivery_id, _visible_to())
    return _json(_delivery(services().deliveries.resend(delivery)), 202)


def _visible_to() -> str | None:
    return None if "admin" in caller().scopes else caller().id


def _endpoint(endpoint: Endpoint) -> EndpointView:
    return EndpointView(
        id=endpoint.id,
        url=endpoint.url,
        events=[*endpoint.events],
        description=endpoint.description,
        created_at=endpoint.created_at,
    )


def _secret(known: list[Secret]) -> SecretView:
    return SecretView(secret=known[0].text, earlier=len(known) - 1)


def _delivery(delivery: Delivery) -> DeliveryView:
    return DeliveryView(
        id=delivery.id,
        event_id=delivery.event_id,
        type=delivery.kind,
        object_id=delivery.object_id,
        endpoint_id=delivery.endpoint or None,
        url=delivery.url,
        status=delivery.status.value,
        attempts=delivery.attempts,
        created_at=delivery.created_at,
        next_attempt_at=delivery.next_at,
        ended_at=delivery.ended_at,
        last_status=delivery.last_status,
        last_error=delivery.last_error,
    )


def _json(body: BaseModel, status: int = 200) -> Response:
    return Response(body.model_dump_json(), status, content_type="application/json")
