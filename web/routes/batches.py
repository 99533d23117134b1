"""`/v1/batches`: run files of requests, in OpenAI's format."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from typing import Final

from flask import Blueprint, Response, request

from shared.errors import Invalid, KeyReused, NotDurable, NotFound
from web.access.auth import caller
from web.batches.results import BatchFolder
from web.batches.store import Batch, BatchStatus, new_batch_id
from web.http import openapi
from web.http.openapi import describe
from web.http.request import idempotency_key, parse_integer, read_body
from web.http.request_id import current_request_id
from web.http.tracing import TRACEPARENT
from web.schemas.batches import (
    BatchErrors,
    BatchErrorView,
    BatchList,
    BatchRequest,
    BatchUsage,
    BatchView,
    InputTokensDetails,
    OutputTokensDetails,
    RequestCounts,
)
from web.services import services

routes = Blueprint("batches", __name__, url_prefix="/v1/batches")

_SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 24 * 3600}
_DEFAULT_LIMIT: Final = 20
_MAX_LIMIT: Final = 100


@routes.post("")
@describe(
    "Create a batch",
    body=BatchRequest,
    responses={200: BatchView},
    errors=(404, 413, 415),
    parameters=(openapi.IDEMPOTENCY_KEY,),
)
def create_batch() -> Response:
    """Runs the requests of a file as jobs of the class `batch`, which start only when no other job of the model waits.

    All lines are checked first. If one is malformed, none runs: the batch has the status `failed`, and `errors` names
    the lines. Requests that fail later are in the error file. Each request runs once, whatever crashes meanwhile.
    """
    body, key, owner = read_body(BatchRequest), idempotency_key(), caller()
    window_s = _window_s(body.completion_window)
    batch_id = _batch_id(owner.id, key) if key else new_batch_id()
    known = services().batches.find(batch_id) if key else None
    if known is not None:
        return _repeated(known, body)
    file = services().files.get(body.input_file_id, owner.id)
    folder = BatchFolder(services().settings.files_path / "batches", batch_id)
    try:
        folder.create(services().files.path(file))
    except FileExistsError:  # an earlier attempt of the same request
        pass
    except FileNotFoundError:
        folder.remove()
        raise NotFound("There is no such file.", code="file_not_found", field="input_file_id") from None
    try:
        batch = services().batches.create(
            batch_id,
            owner.id,
            endpoint=body.endpoint,
            input_file_id=file.id,
            completion_window=body.completion_window,
            window_s=window_s,
            metadata=body.metadata,
            max_queued=owner.limits.max_queued,
            request_id=current_request_id(),
            traceparent=request.environ.get(TRACEPARENT, ""),
            output_lifetime_s=body.output_expires_after.seconds if body.output_expires_after else None,
        )
    except NotDurable:  # the batch may exist
        raise
    except Exception:
        folder.remove()
        raise
    return _json(batch)


@routes.get("")
@describe("List batches", responses={200: BatchList}, errors=(404,), parameters=(openapi.LIMIT, openapi.AFTER))
def list_batches() -> Response:
    """The batches of the API key, newest first. To get the next page, pass `last_id` as `after`."""
    limit = parse_integer("limit", request.args.get("limit", str(_DEFAULT_LIMIT)), 1, _MAX_LIMIT)
    ids, after = services().batches.ids(caller().id), request.args.get("after")
    if after is not None:
        if after not in ids:
            raise NotFound("after must be the id of a batch of the list.", field="after")
        ids = ids[ids.index(after) + 1 :]
    page = services().batches.read(ids[:limit])
    body = BatchList(
        data=[view(batch) for batch in page],
        first_id=page[0].id if page else None,
        last_id=page[-1].id if page else None,
        has_more=len(ids) > limit,
    )
    return Response(body.model_dump_json(), content_type="application/json")


@routes.get("/<batch_id>")
@describe("Get a batch", responses={200: BatchView}, errors=(404,))
def retrieve_batch(batch_id: str) -> Response:
    """The batch with its present status and counts."""
    return _json(services().batches.get(batch_id, caller().id))


@routes.post("/<batch_id>/cancel")
@describe("Cancel a batch", responses={200: BatchView}, errors=(404, 409))
def cancel_batch(batch_id: str) -> Response:
    """The status is `cancelling` until the running requests have ended. Results that exist are in the output file."""
    return _json(services().batches.cancel(batch_id, caller().id))


def view(batch: Batch) -> BatchView:
    """Describe a batch to its owner."""
    counts, times = batch.counts, batch.times or {}
    ended = batch.status.terminal
    errors = [BatchErrorView(**asdict(error)) for error in batch.errors]
    return BatchView(
        id=batch.id,
        endpoint=batch.endpoint,
        model=batch.model,
        errors=BatchErrors(data=errors) if errors else None,
        input_file_id=batch.input_file_id,
        completion_window=batch.completion_window,
        status=batch.status.value,
        output_file_id=batch.output_id if ended else None,
        error_file_id=batch.error_id if ended else None,
        created_at=int(batch.created_at),
        expires_at=int(batch.window_ends_at),
        **{
            f"{status.value}_at": int(times[status.value]) if status.value in times else None
            for status in BatchStatus
            if status is not BatchStatus.VALIDATING
        },
        request_counts=RequestCounts(total=counts.total, completed=counts.completed, failed=counts.failed),
        usage=BatchUsage(
            input_tokens=counts.prompt_tokens,
            input_tokens_details=InputTokensDetails(cached_tokens=counts.cached_tokens),
            output_tokens=counts.completion_tokens,
            output_tokens_details=OutputTokensDetails(reasoning_tokens=counts.reasoning_tokens),
            total_tokens=counts.prompt_tokens + counts.completion_tokens,
        ),
        metadata=batch.metadata,
    )


def _repeated(known: Batch, body: BatchRequest) -> Response:
    """Return the batch that the same request created before."""
    same = (known.input_file_id, known.endpoint, known.completion_window, known.metadata)
    if same != (body.input_file_id, body.endpoint, body.completion_window, body.metadata):
        detail = "This Idempotency-Key was used for another request. Use a new one."
        raise KeyReused(detail, field="Idempotency-Key")
    response = _json(known)
    response.headers["Idempotency-Replayed"] = "true"
    return response


def _batch_id(owner: str, key: str) -> str:
    digest = hashlib.blake2b(f"{owner} {key}".encode(), digest_size=14)
    return f"batch_{digest.hexdigest()}"


def _window_s(window: str) -> float:
    seconds = int(window[:-1]) * _SECONDS[window[-1]]
    maximum = services().settings.max_deadline_s
    if seconds > maximum:
        raise Invalid(f"completion_window can be at most {maximum:.15g} s (MAX_DEADLINE_S).", field="completion_window")
    return float(seconds)


def _json(batch: Batch) -> Response:
    return Response(view(batch).model_dump_json(), content_type="application/json")
