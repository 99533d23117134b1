"""The endpoints that lines of batches can name, translated as their routes do it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

from shared.errors import Invalid
from shared.jobs.record import Job, Priority
from web.batches.requests import Endpoints, Translated
from web.openai.answers import ChatAnswer, CompletionAnswer
from web.openai.requests import ChatRequest, CompletionRequest, GenerationRequest
from web.openai.translate import chat_job, completion_jobs, original_fields
from web.responses.requests import ResponseRequest
from web.responses.stored import StoredResponse
from web.responses.translate import input_items, job_request
from web.responses.translate import original_fields as original_response_fields
from web.results.inputs import embedding_list, rerank_view
from web.schemas.inputs import EmbeddingRequest, InputsRequest, RerankRequest
from web.services import Services


def make_endpoints(current: Services) -> Endpoints:
    """Return the translation of bodies, by endpoint."""
    return {
        "/v1/chat/completions": partial(_chat, current),
        "/v1/completions": partial(_completion, current),
        "/v1/responses": partial(_response, current),
        "/v1/embeddings": partial(_embeddings, current),
        "/v1/rerank": partial(_rerank, current),
    }


def _chat(current: Services, fields: dict[str, Any]) -> Translated:
    body = ChatRequest.model_validate(fields)
    _check(body)
    with original_fields(body):
        requests = [chat_job(body, Priority.BATCH)]
    return Translated(
        requests,
        body.n,
        "messages",
        lambda jobs: ChatAnswer(body, jobs[0], current.jobs, current.job_log).whole(jobs),
        lambda: original_fields(body),
    )


def _completion(current: Services, fields: dict[str, Any]) -> Translated:
    body = CompletionRequest.model_validate(fields)
    _check(body)
    with original_fields(body):
        requests = completion_jobs(body, Priority.BATCH)
    return Translated(
        requests,
        body.n,
        "prompt",
        lambda jobs: CompletionAnswer(body, jobs[0], current.jobs, current.job_log).whole(jobs),
        lambda: original_fields(body),
    )


def _response(current: Services, fields: dict[str, Any]) -> Translated:
    """Translate a response. It is not stored: the output file has it."""
    body = ResponseRequest.model_validate(fields)
    _check(body)
    if body.background or body.previous_response_id is not None:
        field = "background" if body.background else "previous_response_id"
        raise Invalid(f"The requests of a batch cannot have {field}.", field=field)
    translated = job_request(body, input_items(body), [], Priority.BATCH)
    response = StoredResponse.of(body.model_copy(update={"store": False}), "")
    return Translated(
        [translated.request],
        1,
        "input",
        lambda jobs: current.responses.answer(response, jobs[0]).model_dump_json(),
        lambda: original_response_fields(translated.paths),
    )


def _embeddings(current: Services, fields: dict[str, Any]) -> Translated:
    body = EmbeddingRequest.model_validate(fields)
    return _inputs(body, lambda jobs: embedding_list(body, jobs[0], current.jobs.text(jobs[0])))


def _rerank(current: Services, fields: dict[str, Any]) -> Translated:
    body = RerankRequest.model_validate(fields)
    return _inputs(body, lambda jobs: rerank_view(body, jobs[0], current.jobs.text(jobs[0])))


def _inputs(body: InputsRequest, render: Callable[[Sequence[Job]], str]) -> Translated:
    return Translated([body], 1, body.inputs_field, render, nullcontext)


def _check(body: GenerationRequest | ResponseRequest) -> None:
    if body.stream:
        raise Invalid("The requests of a batch cannot be streamed: leave out stream.", field="stream")
