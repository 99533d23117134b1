"""`/v1/messages`: Anthropic's Messages API. Each request becomes a job."""

from __future__ import annotations

from itertools import chain

from flask import Blueprint, Response, request

from shared.jobs.record import Job, Status
from shared.jobs.store import Accepted
from shared.models.registry import ModelCard
from web.access.auth import caller
from web.anthropic.answer import Answer, blocks_of, message_of
from web.anthropic.schemas import AnthropicMessage, CountRequest, MessagesRequest, TokenCount
from web.anthropic.stream import MessageStream, deltas
from web.anthropic.translate import job_request, original_fields, thinking_shown
from web.http import openapi
from web.http.anthropic_errors import REQUEST_ID
from web.http.disconnect import CONNECTION
from web.http.openapi import describe
from web.http.request import read_body
from web.http.request_id import current_request_id
from web.results.failures import job_failure
from web.routes.submission import submit_choices, with_job_headers
from web.routes.waiting import (
    disconnect_handler,
    ended_by_client,
    unfinished,
    wait_for_end,
    watch_client,
)
from web.services import services

routes = Blueprint("anthropic", __name__)


@routes.after_request
def _add_request_id(response: Response) -> Response:
    response.headers[REQUEST_ID] = current_request_id()
    return response


@routes.post("/v1/messages")
@describe(
    "Create a message (Anthropic format)",
    body=MessagesRequest,
    responses={200: AnthropicMessage},
    streams=("text/event-stream",),
    errors=(404, 409, 410, 413, 415, 504),
    parameters=(openapi.IDEMPOTENCY_KEY, openapi.BETA),
)
def create_message() -> Response:
    """Returns the next message of a conversation, or with `stream` the events of the Messages API.

    The job is in the `Location` header. If the client disconnects, the job is cancelled. With an `Idempotency-Key` it
    is not: the same request sent again returns the same message. Headers `anthropic-version` and `anthropic-beta` are
    accepted and have no effect.
    """
    return services().open_responses.respond(caller().id, request.environ.get(CONNECTION), _respond)


@routes.post("/v1/messages/count_tokens")
@describe(
    "Count the tokens of a prompt (Anthropic format)",
    body=CountRequest,
    responses={200: TokenCount},
    errors=(404, 413, 415),
    parameters=(openapi.BETA,),
)
def count_tokens() -> Response:
    """Returns the number of tokens that the model would read, through its chat template and with its tools."""
    body = read_body(CountRequest)
    translated = job_request(body, _card(body.model))
    with original_fields(translated.paths):
        loaded = services().image_loader.load(translated.request, caller=caller().id)
        count = services().admission.count_tokens(loaded.request)
    return Response(TokenCount(input_tokens=count).model_dump_json(), content_type="application/json")


def _card(name: str) -> ModelCard | None:
    """Return a model's card; None if no worker has announced the model."""
    entry, _ = services().catalog.resolve_adapter(name)
    cards = services().cluster.snapshot().models
    return cards.get(entry.id if entry else name) or cards.get(name.rpartition(":")[0])


def _respond() -> Response:
    body = read_body(MessagesRequest)
    translated = job_request(body, _card(body.model))
    with original_fields(translated.paths):
        accepted = submit_choices([translated.request], 1, body)
    answer = Answer(thinking_shown(body))
    response = (_stream if body.stream else _complete)(accepted, answer, body.max_tokens)
    return with_job_headers(response, accepted)


def _stream(accepted: Accepted, answer: Answer, max_tokens: int) -> Response:
    current, job = services(), accepted.job
    stream = MessageStream(job, answer, max_tokens, accepted.prompt_tokens, lambda: current.jobs.latest(job))
    # A client that has received a part of the answer does not repeat its request.
    on_disconnect = disconnect_handler(job, lambda: not stream.begun)
    events = current.follower.follow(job.id, 0, watch_client(request.environ, on_disconnect))
    return stream.response(ended_by_client(events, on_disconnect), current.metrics)


def _complete(accepted: Accepted, answer: Answer, max_tokens: int) -> Response:
    (job,) = latest = wait_for_end([accepted.job], disconnect_handler(accepted.job))
    if response := unfinished(latest):
        return response
    if job.status is not Status.SUCCEEDED:
        raise job_failure(job, "messages")
    message = message_of(job, _content(job, answer), max_tokens, has_calls=answer.has_calls)
    return Response(message.model_dump_json(), content_type="application/json")


def _content(job: Job, answer: Answer) -> list[dict[str, object]]:
    """Return the blocks of an ended job's answer, from its log."""
    events = chain.from_iterable(services().follower.follow(job.id, 0))
    parts = chain.from_iterable(answer.add(delta) for delta in deltas(events))
    return blocks_of([*parts, *answer.end()])
