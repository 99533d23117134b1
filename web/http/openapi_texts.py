"""Texts of the OpenAPI document: what applies to all routes, error codes, and examples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from shared.errors import Expiry

ERROR_CODES: Final[Mapping[int, tuple[str, ...]]] = {
    400: ("bad_request", "invalid_json", "invalid_utf8"),
    401: ("unauthorized",),
    403: ("forbidden", "csrf_token", "priority_not_allowed"),
    404: (
        "job_not_found",
        "route_not_found",
        "not_found",
        "model_not_found",
        "model_not_loaded",
        "operation_not_found",
        "file_not_found",
        "batch_not_found",
        "response_not_found",
        "item_not_found",
        "webhook_not_found",
        "delivery_not_found",
        "key_not_found",
    ),
    406: ("not_acceptable",),
    408: ("request_timeout",),
    409: (
        "job_active",
        "job_cancelled",
        "job_ended",
        "key_revoked",
        "conflict",
        "model_not_loaded",
        "batch_ended",
        "response_active",
        "response_ended",
        "not_dead",
        "too_many_endpoints",
        "name_taken",
        "alias_taken",
        "model_loaded",
    ),
    410: ("log_expired", "log_trimmed", "request_gone", "gone"),
    413: ("body_too_large", "image_too_large", "files_quota_exceeded"),
    415: ("unsupported_media_type",),
    422: (
        "invalid_request",
        "idempotency_key_reused",
        "load_failed",
        "unknown_parameter",
        "unsupported_parameter",
        "no_images",
        "not_supported",
        "adapter_not_found",
        "adapter_error",
        "too_many_images",
        "image_format",
        "image_broken",
        "image_too_many_pixels",
        "image_shape",
        "image_url_refused",
        "image_unreachable",
        "webhook_url_refused",
        "worker_not_found",
        "worker_needed",
        "job_too_large",
    ),
    429: (
        "rate_limited",
        "tokens_per_minute",
        "tokens_per_day",
        "key_queue_full",
        "too_many_streams",
        "too_many_connections",
        "too_many_uploads",
        "too_many_batches",
    ),
    431: ("head_too_large",),
    500: ("internal",),
    503: (
        "unavailable",
        "queue_full",
        "queue_memory_full",
        "not_durable",
        "too_many_connections",
        "too_many_bytes",
        "disk_full",
        "archive_unavailable",
        "redis_unsuitable",
        "restarting",
        "no_worker",
        "model_not_loaded",
    ),
    504: (*Expiry, "job_expired"),
}
"""Possible values of an error's `code`, by status. `/inference` also returns the codes of failed jobs."""
DESCRIPTION: Final = """Durable, streaming inference jobs for MLX models.

## Authentication

Send an API key in the header `X-API-Key`, or as `Authorization: Bearer <key>`. Generating text needs the scope `infer`,
loading, unloading and downloading models needs `admin`.

## Request ids

Every response has the header `X-Request-ID`. A request may set it to 1 to 128 characters of `A-Z a-z 0-9 . _ -`;
otherwise the service generates an id. The same id is in the service's log.

## Errors

Errors are `application/problem+json` (RFC 9457). `code` is stable and meant for programs, `detail` is meant for people,
and `field` names the field, parameter or header that is wrong. Routes of the OpenAI API, and paths below `/v1/` that do
not exist, have errors in OpenAI's format; `/v1/messages` and the paths below it in Anthropic's.

## Rate limits

Each API key has a limit for requests with GET, and one for all others. Responses report the limit that applies in
`X-RateLimit-Limit`, `X-RateLimit-Remaining` and `X-RateLimit-Reset` (seconds since the epoch), and in `RateLimit` and
`RateLimit-Policy`. Answers to submissions also report the key's token limits. A request over a limit gets 429, and one
for which the service has no capacity 503; `Retry-After` has the seconds to wait. `GET /v1/limits` shows the limits.

## Streams

A stream consists of numbered events: `queued`, `started`, `chunk` and `resumed`, and finally exactly one `done`, which
contains the complete job. The concatenated texts of all `chunk` events are the job's text. If the job has `logprobs`,
each `chunk` has a list `logprobs` in addition to `text`. A stream can be resumed after any event. Ignore events of
unknown types: later versions may add some."""
TAGS: Final = {
    "jobs": "Submit jobs and read them later: poll, stream, list, cancel, delete.",
    "job_requests": "The stored requests of jobs, and running them again.",
    "inference": "Generate text and get it in the response.",
    "models": "List models; load and unload them on running workers.",
    "downloads": "Download models, and set their aliases.",
    "openai": "The OpenAI API: chat completions, text completions, models.",
    "anthropic": "Anthropic's Messages API.",
    "responses": "The Responses API of OpenAI: responses that are stored, continued, and run in the background.",
    "files": "Files with the requests and the results of batches, in the format of the OpenAI API.",
    "batches": "Run files of requests, in the format of the OpenAI API.",
    "webhooks": "Webhook endpoints, secrets and deliveries.",
    "keys": "List, create, limit and revoke API keys.",
    "overview": "The state of queues and workers, now and over the last hour.",
    "usage": "Usage and limits of API keys.",
    "health": "Health, probes and metrics. The probes need no API key; health and metrics show more with one.",
    "openapi": "This documentation. No API key is needed.",
}
_MESSAGES_EXAMPLE: Final = {
    "model": "SmolLM2-135M-Instruct",
    "messages": [{"role": "user", "content": "What is the capital of France?"}],
}
EXAMPLES: Final[Mapping[str, Mapping[str, Any]]] = {
    "JobRequest": {"messages": [{"role": "user", "content": "What is the capital of France?"}], "max_tokens": 64},
    "MessagesRequest": _MESSAGES_EXAMPLE | {"max_tokens": 64},
    "CountRequest": _MESSAGES_EXAMPLE,
    "ChatRequest": {"messages": [{"role": "user", "content": "What is the capital of France?"}]},
    "CompletionRequest": {"prompt": "Once upon a time,", "max_tokens": 64},
    "EmbeddingRequest": {"model": "Qwen3-Embedding-0.6B", "input": ["The first text.", "The second one."]},
    "RerankRequest": {
        "model": "Qwen3-Reranker-0.6B",
        "query": "What is the capital of France?",
        "documents": ["Paris is the capital of France.", "A spider has eight legs."],
    },
    "ResponseRequest": {"input": "What is the capital of France?"},
    "TokensRequest": {"input": "What is the capital of France?"},
    "KeyRequest": {"name": "chat application", "scopes": ["infer"], "rate_limit": "600/minute"},
    "KeyLimits": {"rate_limit": "600/minute", "max_priority": "batch"},
    "BatchRequest": {
        "input_file_id": "file-18ec9252ab231d2c8a3e5f0b1c2d",
        "endpoint": "/v1/chat/completions",
        "completion_window": "24h",
    },
    "EndpointRequest": {"url": "https://example.org/hooks", "events": ["batch.completed", "batch.failed"]},
    "RotationRequest": {"overlap_s": 3600},
    "LoadRequest": {"model": "SmolLM2-135M-Instruct"},
    "DownloadRequest": {"hub": "mlx-community/Qwen3-4B-4bit"},
    "AliasesRequest": {"aliases": ["small", "default-chat"]},
    "UnloadRequest": {"model": "SmolLM2-135M-Instruct"},
}
"""Examples of request bodies by name of the model."""
