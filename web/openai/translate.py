"""Turn requests of the OpenAI API into job requests, and the errors of these into errors of the original fields."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from shared.jobs.record import Priority
from web.http.field_names import named_fields, renamed
from web.openai.requests import ChatRequest, CompletionRequest, GenerationRequest
from web.schemas.requests import JobRequest

_SAME: Final = (
    *("model", "adapter", "messages", "max_tokens"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias"),
    *("response_format", "tools", "tool_choice"),
    *("parallel_tool_calls", "reasoning_effort", "enable_thinking", "thinking_budget", "chat_template_kwargs"),
    "continue_final_message",
)
"""Fields that have the same name and meaning in job requests."""
_FORMATS: Final = ("regex", "choice", "grammar")


def chat_job(body: ChatRequest, highest: Priority) -> JobRequest:
    """Return the job for a choice of a chat completion.

    Args:
        highest: the highest priority that the API key may use.
    """
    fields = _common(body, highest)
    if body.max_completion_tokens is not None:
        fields["max_tokens"] = body.max_completion_tokens
    if body.logprobs:
        fields["logprobs"] = body.top_logprobs or 0
    for name in _FORMATS:
        if (value := getattr(body, name)) is not None:
            fields["response_format"] = {"type": name, name: value}
    return JobRequest.model_validate({**fields, "parse": "message"})


def completion_jobs(body: CompletionRequest, highest: Priority) -> list[JobRequest]:
    """Return the job for each prompt of a text completion."""
    fields = _common(body, highest)
    if body.logprobs is not None:
        fields["logprobs"] = body.logprobs
    prompts: Iterator[dict[str, Any]] = (
        {"prompt": prompt, "raw": True} if isinstance(prompt, str) else {"prompt_tokens": prompt}
        for prompt in body.prompts
    )
    return [JobRequest.model_validate({**fields, **prompt}) for prompt in prompts]


def _common(body: GenerationRequest, highest: Priority) -> dict[str, Any]:
    # Only fields that were sent: for others, the model can have defaults.
    fields: dict[str, Any] = {name: getattr(body, name) for name in _SAME if name in body.model_fields_set}
    return {**fields, **body.sampling_fields(highest)}


@contextmanager
def original_fields(body: GenerationRequest) -> Iterator[None]:
    """Let errors name the fields of the request's body instead of those of the job request."""
    names = _renamed(body)
    with named_fields(lambda field: renamed(field, names)):
        yield


def _renamed(body: GenerationRequest) -> dict[str, str]:
    """Return the names that job requests have for fields of this body, with the original names."""
    if isinstance(body, CompletionRequest):
        return {"prompt_tokens": "prompt"}
    renamed: dict[str, str] = {f"response_format.{name}": name for name in _FORMATS if name in body.model_fields_set}
    if "max_completion_tokens" in body.model_fields_set and "max_tokens" not in body.model_fields_set:
        renamed["max_tokens"] = "max_completion_tokens"
    return renamed
