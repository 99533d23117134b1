"""`/v1/chat/completions`, `/v1/completions` and `/v1/models`."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime

from flask import Blueprint, Response, request

from shared.errors import NotFound
from shared.jobs.record import Job, Status
from shared.jobs.store import Accepted
from web.access.auth import caller
from web.http import openapi
from web.http.disconnect import CONNECTION
from web.http.openapi import describe
from web.http.request import read_body
from web.openai.answer_schemas import ChatCompletion, Completion
from web.openai.answers import Answer, ChatAnswer, CompletionAnswer
from web.openai.requests import ChatRequest, CompletionRequest
from web.openai.streams import AnswerStream
from web.openai.translate import chat_job, completion_jobs, original_fields
from web.results.failures import job_failure
from web.routes.models import model_views
from web.routes.submission import submit_choices, with_job_headers
from web.routes.waiting import disconnect_handler, unfinished, wait_for_end, watch_client
from web.schemas.models import ModelView, OpenAIModel, OpenAIModelList
from web.services import services
from web.streaming.merge import follow_all

routes = Blueprint("openai", __name__)

ERRORS = (400, 404, 409, 410, 413, 415, 504)


@routes.post("/v1/chat/completions")
@describe(
    "Create a chat completion (OpenAI format)",
    body=ChatRequest,
    responses={200: ChatCompletion},
    streams=("text/event-stream",),
    errors=ERRORS,
    parameters=(openapi.IDEMPOTENCY_KEY,),
)
def create_chat_completion() -> Response:
    """Returns the complete answer, or a stream of chunks if `stream` is true.

    The request becomes a job, whose path is in the `Location` header: the answer survives crashes of the service, and
    can be read again there. Further choices (`n`) are further jobs, with the ids in its `children`.

    If the client disconnects, the jobs are cancelled. OpenAI's clients, which repeat a request by themselves, have 5
    seconds to do so: the repeated request continues the same jobs.
    """
    return counted(_chat_completion)


@routes.post("/v1/completions")
@describe(
    "Create a text completion (OpenAI format)",
    body=CompletionRequest,
    responses={200: Completion},
    streams=("text/event-stream",),
    errors=ERRORS,
    parameters=(openapi.IDEMPOTENCY_KEY,),
)
def create_completion() -> Response:
    """Continues texts or token ids without the chat template. Otherwise as `/v1/chat/completions`."""
    return counted(_completion)


@routes.get("/v1/models")
@describe("List models (OpenAI format)", responses={200: OpenAIModelList})
def list_openai_models() -> Response:
    """The models of `/inference/models` in the formats of OpenAI and of Anthropic, with all original fields.

    Each adapter is a further model, `model:adapter`.
    """
    data = [model for view in model_views() for model in _openai_models(view)]
    first, last = (data[0].id, data[-1].id) if data else (None, None)
    models = OpenAIModelList(data=data, first_id=first, last_id=last)
    return Response(models.model_dump_json(), content_type="application/json")


@routes.get("/v1/models/<path:model_id>")
@describe("Get a model (OpenAI format)", responses={200: OpenAIModel}, errors=(404,))
def get_openai_model(model_id: str) -> Response:
    """The model with this id or alias, or with one of its adapters (`model:adapter`)."""
    entry, adapter = services().catalog.resolve_adapter(model_id)
    name = f"{entry.id}:{adapter}" if entry and adapter else entry.id if entry else model_id
    models = (model for view in model_views() for model in _openai_models(view))
    model = next((each for each in models if each.id == name), None)
    if model is None:
        raise NotFound(
            f"The model {model_id!r} does not exist. GET /v1/models lists the models.",
            code="model_not_found",
            field="model",
        )
    return Response(model.model_dump_json(), content_type="application/json")


def _openai_models(view: ModelView) -> list[OpenAIModel]:
    """Return a model, and the model with each adapter that it can use."""
    usable = [each.name for each in view.adapters if each.problem is None]
    with_adapter = {"aliases": [], "adapters": [], "default": False}
    views = [view.model_copy(update={"id": f"{view.id}:{name}", **with_adapter}) for name in usable]
    created = _created(view.id)
    return [_openai_model(view, created), *(_openai_model(each, created, view.id) for each in views)]


def _openai_model(view: ModelView, created: int, parent: str | None = None) -> OpenAIModel:
    return OpenAIModel(
        parent=parent,
        **view.model_dump(exclude={"object"}),
        created=created,
        created_at=f"{datetime.fromtimestamp(created, UTC):%Y-%m-%dT%H:%M:%SZ}",
        display_name=view.id,
        max_input_tokens=view.context,
    )


def _created(name: str) -> int:
    """Return when a model's files were written, or else when the first of its workers loaded it; 0 if unknown."""
    entry = services().catalog.models.get(name)
    if entry and entry.modified_at is not None:
        return int(entry.modified_at)
    workers = services().cluster.snapshot().workers
    return int(min((worker.started_at for worker in workers if worker.model == name), default=0))


def counted(make: Callable[[], Response]) -> Response:
    """Count a response as open for the caller until it is complete, see `web.access.open_responses`."""
    return services().open_responses.respond(caller().id, request.environ.get(CONNECTION), make)


def _chat_completion() -> Response:
    current, body = services(), read_body(ChatRequest)
    with original_fields(body):
        accepted = submit_choices([chat_job(body, caller().max_priority)], body.n, body)
        answer = ChatAnswer(body, accepted.job, current.jobs, current.job_log)
        stream = body.stream
        del body  # the response can take hours, and a body many megabytes
        return _response(accepted, answer, "messages", stream=stream)


def _completion() -> Response:
    current, body = services(), read_body(CompletionRequest)
    with original_fields(body):
        accepted = submit_choices(completion_jobs(body, caller().max_priority), body.n, body)
        answer = CompletionAnswer(body, accepted.job, current.jobs, current.job_log)
        return _response(accepted, answer, "prompt", stream=body.stream)


def _response(accepted: Accepted, answer: Answer, prompt_field: str, *, stream: bool) -> Response:
    jobs = [accepted.job, *(services().jobs.get(child, caller().id) for child in accepted.job.children)]
    response = _stream(jobs, answer, prompt_field) if stream else _whole(jobs, answer, prompt_field)
    return with_job_headers(response, accepted)


def _whole(jobs: list[Job], answer: Answer, prompt_field: str) -> Response:
    latest = wait_for_end(jobs, disconnect_handler(jobs[0]))
    if response := unfinished(latest):
        return response
    for job in latest:
        if job.status is not Status.SUCCEEDED:
            raise job_failure(job, prompt_field)
    return Response(answer.whole(latest), content_type="application/json")


def _stream(jobs: list[Job], answer: Answer, prompt_field: str) -> Response:
    current = services()
    # A client that has received a part of the answer does not repeat its request.
    on_disconnect = disconnect_handler(jobs[0], lambda: not stream.begun)
    feed = follow_all(current.follower, [job.id for job in jobs], watch_client(request.environ, on_disconnect))
    stream = AnswerStream(jobs, answer, feed, current.jobs.latest, prompt_field, on_disconnect)
    return stream.response(current.metrics)
