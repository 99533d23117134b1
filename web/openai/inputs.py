"""`/v1/embeddings` and `/v1/rerank`."""

from __future__ import annotations

from collections.abc import Callable

from flask import Blueprint, Response

from shared.jobs.record import Job, Status
from web.http import openapi
from web.http.openapi import describe
from web.http.request import read_body
from web.openai.routes import ERRORS, counted
from web.results.failures import job_failure
from web.results.inputs import embedding_list, rerank_view
from web.routes.submission import submit_choices, with_job_headers
from web.routes.waiting import disconnect_handler, unfinished, wait_for_end
from web.schemas.inputs import EmbeddingList, EmbeddingRequest, InputsRequest, RerankRequest, RerankView
from web.services import services

routes = Blueprint("inputs", __name__)


@routes.post("/v1/embeddings")
@describe(
    "Compute embeddings (OpenAI format)",
    body=EmbeddingRequest,
    responses={200: EmbeddingList},
    errors=ERRORS,
    parameters=(openapi.IDEMPOTENCY_KEY,),
)
def create_embeddings() -> Response:
    """Returns a vector for each input, from a model of the kind `embedding`.

    The request becomes a job, whose path is in the `Location` header. If the client disconnects, the job is cancelled,
    as for `/v1/chat/completions`.
    """
    body = read_body(EmbeddingRequest)
    return counted(lambda: _answer(body, lambda job, text: embedding_list(body, job, text)))


@routes.post("/v1/rerank")
@describe(
    "Rank documents (format of Jina and Cohere)",
    body=RerankRequest,
    responses={200: RerankView},
    errors=ERRORS,
    parameters=(openapi.IDEMPOTENCY_KEY,),
)
def rerank() -> Response:
    """Returns the documents with their scores, the most relevant first, from a model of the kind `rerank`.

    Otherwise as `/v1/embeddings`.
    """
    body = read_body(RerankRequest)
    return counted(lambda: _answer(body, lambda job, text: rerank_view(body, job, text)))


def _answer(body: InputsRequest, render: Callable[[Job, str], str]) -> Response:
    accepted = submit_choices([body], 1, body)
    ended = wait_for_end([accepted.job], disconnect_handler(accepted.job))
    response = unfinished(ended)
    if response is None:
        (job,) = ended
        if job.status is not Status.SUCCEEDED:
            raise job_failure(job, body.inputs_field)
        response = Response(render(job, services().jobs.text(job)), content_type="application/json")
    return with_job_headers(response, accepted)
