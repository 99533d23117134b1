"""The API's OpenAPI document: each route says what it takes and gives, and the document is made of that."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass
from functools import lru_cache
from http import HTTPStatus
from typing import Any, Final, ParamSpec, TypeVar

from flask import Flask
from openapi_pydantic import (
    Components,
    Header,
    Info,
    MediaType,
    OpenAPI,
    Operation,
    Parameter,
    PathItem,
    RequestBody,
    Response,
    Schema,
    SecurityScheme,
    Tag,
)
from openapi_pydantic.util import PydanticSchema, construct_open_api_with_schema_class
from pydantic import BaseModel
from werkzeug.routing import Rule

from shared.errors import Expiry
from web.access.auth import OPEN
from web.http.problems import MEDIA_TYPE
from web.schemas.problems import ProblemDetails
from web.schemas.requests import JobRequest
from web.streaming.formats import FORMATS

P = ParamSpec("P")
R = TypeVar("R")

_ATTRIBUTE: Final = "openapi"
_REFUSALS: Final = (401, 403, 422, 429, 500, 503)
"""What any route that needs a key may answer."""
ERROR_CODES: Final[Mapping[int, tuple[str, ...]]] = {
    400: ("bad_request", "invalid_json", "invalid_utf8"),
    401: ("unauthorized",),
    403: ("forbidden",),
    404: (
        "job_not_found",
        "route_not_found",
        "not_found",
        "model_not_found",
        "model_not_loaded",
        "operation_not_found",
    ),
    406: ("not_acceptable",),
    409: ("job_active", "job_cancelled", "job_ended", "conflict", "model_not_loaded"),
    410: ("log_expired", "log_trimmed", "gone"),
    413: ("body_too_large", "image_too_large"),
    415: ("unsupported_media_type",),
    422: (
        "invalid_request",
        "idempotency_key_reused",
        "model_not_found",
        "unknown_parameter",
        "no_images",
        "too_many_images",
        "image_format",
        "image_broken",
        "image_too_many_pixels",
        "image_shape",
        "image_url_refused",
        "image_unreachable",
        "worker_not_found",
        "worker_needed",
        "job_too_large",
    ),
    429: ("rate_limited", "key_queue_full"),
    500: ("internal",),
    503: (
        "unavailable",
        "queue_full",
        "queue_memory_full",
        "not_durable",
        "restarting",
        "no_worker",
        "model_not_loaded",
    ),
    504: (*Expiry, "job_expired"),
}
"""What an error's `code` may be, by status; of jobs that failed, `/inference` passes the job's own code on."""
_RETRY_AFTER: Final = {"Retry-After": Header(description="Seconds to wait", param_schema=Schema(type="integer"))}
_ABOUT: Final = """Durable, streaming inference jobs for MLX models.

Send an API key as `X-API-Key` or as a Bearer token. Every answer carries `X-Request-ID`, the caller's own when it is
1 to 128 characters of `A-Z a-z 0-9 . _ -`. Errors are `application/problem+json` with a stable `code`.

A stream has the events `queued`, `started`, `chunk`, `resumed` and, last and once, `done` with the whole job. The
texts of all chunks together are the job's text. A chunk of a job with `logprobs` has a list of that name beside its
`text`. Skip events of kinds that you do not know. A stream can be read again from any event on."""


def _parameter(name: str, where: str, about: str, **schema: Any) -> Parameter:
    return Parameter(name=name, **{"in": where}, description=about, param_schema=Schema(**schema))


WAIT: Final = _parameter("wait", "query", "Seconds to wait for the job's end", type="number", minimum=0)
LIMIT: Final = _parameter("limit", "query", "Jobs a page", type="integer", minimum=1, maximum=100, default=20)
BEFORE: Final = _parameter("before", "query", "`next` of the page before", type="string")
STARTING_AFTER: Final = _parameter(
    "starting_after", "query", "Number of the last event seen", type="integer", minimum=0, default=0
)
LAST_EVENT_ID: Final = _parameter(
    "Last-Event-ID", "header", "The same, as browsers send it when they reconnect", type="integer", minimum=0
)
IDEMPOTENCY_KEY: Final = _parameter(
    "Idempotency-Key", "header", "Sent again with the same key, the request makes no second job; another is refused",
    type="string", maxLength=255,
)  # fmt: skip
PREFER: Final = _parameter("Prefer", "header", "`wait=N`: answer when the job ends within N seconds", type="string")

Content = type[BaseModel] | str | None
"""A model, a media type, or nothing."""


@dataclass(frozen=True, slots=True)
class describe:  # noqa: N801 - used as a decorator
    """Describes a view function for the document; the function's docstring is the long description.

    Attributes:
        answers: what the route answers, by status.
        body: model of the request's body.
        streams: whether the route can answer with a stream of events.
        errors: statuses of the route's own errors, beside those of every route.
    """

    summary: str
    _: KW_ONLY
    answers: Mapping[int, Content]
    body: type[BaseModel] | None = None
    streams: bool = False
    errors: tuple[int, ...] = ()
    parameters: tuple[Parameter, ...] = ()

    def __call__(self, view: Callable[P, R]) -> Callable[P, R]:
        """Mark the function."""
        setattr(view, _ATTRIBUTE, self)
        return view


def _description(view: Callable[..., object]) -> describe:
    about: describe = getattr(view, _ATTRIBUTE)
    return about


def query_names(view: Callable[..., object]) -> frozenset[str]:
    """The query parameters that a described view knows."""
    return frozenset(parameter.name for parameter in _description(view).parameters if parameter.param_in == "query")


@lru_cache(maxsize=1)
def document(app: Flask) -> str:
    """The document of all the application's routes, as JSON."""
    paths: dict[str, PathItem] = {}
    for rule in app.url_map.iter_rules():
        item = paths.setdefault(re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule), PathItem())
        for method in sorted((rule.methods or set()) - {"HEAD", "OPTIONS"}):
            setattr(item, method.lower(), _operation(app, rule, method))
    whole = OpenAPI(
        openapi="3.1.0",
        info=Info(title="mlxq", version="1", description=_ABOUT),
        paths=paths,
        tags=[Tag(name=name) for name in app.blueprints],
        components=Components(
            securitySchemes={
                "ApiKey": SecurityScheme(type="apiKey", name="X-API-Key", security_scheme_in="header"),
                "Bearer": SecurityScheme(type="http", scheme="bearer"),
            }
        ),
    )
    return construct_open_api_with_schema_class(whole).model_dump_json(by_alias=True, exclude_none=True)


def _operation(app: Flask, rule: Rule, method: str) -> Operation:
    view = app.view_functions[rule.endpoint]
    about = _description(view)
    tag = rule.endpoint.split(".")[0]
    several = {"GET", "POST"} <= (rule.methods or set())
    return Operation(
        operationId=f"{view.__name__}_{method.lower()}" if several else view.__name__,
        tags=[tag],
        summary=about.summary,
        description=inspect.getdoc(view),
        parameters=[*_path_parameters(rule), *about.parameters] or None,
        requestBody=_body(about.body),
        responses=dict(_responses(about, secured=tag not in OPEN)),
        security=None if tag in OPEN else [{"ApiKey": []}, {"Bearer": []}],
    )


def _path_parameters(rule: Rule) -> list[Parameter]:
    return [
        Parameter(name=name, **{"in": "path"}, required=True, param_schema=Schema(type="string"))
        for name in sorted(rule.arguments)
    ]


def _body(model: type[BaseModel] | None) -> RequestBody | None:
    if model is None:
        return None
    content = {"application/json": _media(model)}
    if issubclass(model, JobRequest):
        content["multipart/form-data"] = MediaType(media_type_schema=_form(model))
    return RequestBody(required=True, content=content)


def _form(model: type[BaseModel]) -> Schema:
    """The same with files."""
    return Schema(
        type="object",
        required=["request"],
        properties={
            "request": Schema(type="string", description=f"A {model.__name__} as JSON"),
            "images": Schema(type="array", items=Schema(type="string", schema_format="binary")),
        },
    )


def _responses(about: describe, *, secured: bool) -> Iterator[tuple[str, Response]]:
    for status in sorted({*about.errors, *(_REFUSALS if secured else (500,))} - set(about.answers)):
        yield (
            str(status),
            Response(
                description=f"{HTTPStatus(status).phrase}: {', '.join(f'`{code}`' for code in ERROR_CODES[status])}",
                headers=dict(_RETRY_AFTER) if status in (429, 503) else None,
                content={MEDIA_TYPE: _media(ProblemDetails)},
            ),
        )
    for status, content in about.answers.items():
        yield str(status), Response(description=HTTPStatus(status).phrase, content=_content(content))
    if about.streams:
        events = {media_type: _media(None) for media_type in FORMATS}
        plain = about.answers.get(200)
        yield "200", Response(description="The answer, or its events", content={**(_content(plain) or {}), **events})


def _content(content: Content) -> dict[str, MediaType] | None:
    if content is None:
        return None
    if isinstance(content, str):
        return {content: _media(None)}
    return {"application/json": _media(content)}


def _media(model: type[BaseModel] | None) -> MediaType:
    return MediaType(media_type_schema=PydanticSchema(schema_class=model) if model else Schema(type="string"))
