"""The endpoints that lines of batches can name, translated as their routes do it."""

from __future__ import annotations

from functools import partial
from typing import Any

from shared.errors import Invalid
from shared.jobs.record import Priority
from web.batches.requests import Endpoints, Translated
from web.openai.answers import ChatAnswer, CompletionAnswer
from web.openai.requests import ChatRequest, CompletionRequest, GenerationRequest
from web.openai.translate import chat_job, completion_jobs, original_fields
from web.services import Services


def make_endpoints(current: Services) -> Endpoints:
    """Return the translation of bodies, by endpoint."""
    return {"/v1/chat/completions": partial(_chat, current), "/v1/completions": partial(_completion, current)}


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


def _check(body: GenerationRequest) -> None:
    if body.stream:
        raise Invalid("The requests of a batch cannot be streamed: leave out stream.", field="stream")
