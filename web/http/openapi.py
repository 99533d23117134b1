"""The OpenAPI document of the API, generated from the descriptions that the routes carry (`describe`)."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass
from functools import lru_cache
from http import HTTPStatus
from typing import Any, Final, ParamSpec, TypeVar

from flask import Flask
from openapi_pydantic import (
    Components,
    Encoding,
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

from shared import VERSION
from web.access.auth import PUBLIC_BLUEPRINTS
from web.http import anthropic_errors, openai_errors
from web.http.openapi_texts import DESCRIPTION, ERROR_CODES, EXAMPLES, TAGS
from web.schemas.problems import MEDIA_TYPE, AnthropicError, OpenAIError, ProblemDetails
from web.schemas.requests import JobRequest

P = ParamSpec("P")
R = TypeVar("R")

_ATTRIBUTE: Final = "openapi"
_COMMON_ERRORS: Final = (400, 408, 429, 431, 500, 503)
"""Error statuses that every route may return."""
_ERRORS_WITH_KEY: Final = (401, 403, 422)
"""Error statuses that every route with authentication may return in addition."""
_RETRY_AFTER: Final = {
    "Retry-After": Header(description="Seconds to wait before trying again", param_schema=Schema(type="integer"))
}


def _parameter(name: str, location: str, description: str, **schema: Any) -> Parameter:
    return Parameter(name=name, **{"in": location}, description=description, param_schema=Schema(**schema))


WAIT: Final = _parameter(
    "wait", "query", "Seconds to wait for the job to end before responding", type="number", minimum=0
)
LIMIT: Final = _parameter(
    "limit", "query", "Maximum number of items to return", type="integer", minimum=1, maximum=100, default=20
)
BEFORE: Final = _parameter(
    "before", "query", "`next` of the previous page", type="number", minimum=0, exclusiveMaximum=1e11
)
JOB_FILTERS: Final = (
    _parameter(
        "status",
        "query",
        "Only jobs with this status",
        type="string",
        enum=["queued", "running", "succeeded", "failed", "cancelled", "expired"],
    ),
    _parameter("model", "query", "Only jobs of this model, by its id", type="string"),
    _parameter("priority", "query", "Only jobs of this class", type="string", enum=["high", "normal", "batch"]),
    _parameter("after", "query", "Only jobs created at this time or later", type="number", exclusiveMaximum=1e11),
    _parameter(
        "metadata",
        "query",
        "`name=value`: only jobs with this metadata; may be repeated",
        type="array",
        items={"type": "string", "pattern": "="},
    ),
    _parameter(
        "key", "query", "Id of an API key, or `all`. Keys other than the caller's need the scope `admin`", type="string"
    ),
)
PURGE: Final = _parameter(
    "purge", "query", "Also erase everything that belongs to the key", type="boolean", default=False
)
STARTING_AFTER: Final = _parameter(
    "starting_after", "query", "Number of the last event received", type="integer", minimum=0, default=0
)
PAGE_LIMIT: Final = _parameter(
    "limit", "query", "Maximum number of items to return", type="integer", minimum=1, maximum=10_000
)
AFTER: Final = _parameter("after", "query", "`last_id` of the previous page", type="string")
ORDER: Final = _parameter(
    "order", "query", "Order by time of creation", type="string", enum=["asc", "desc"], default="desc"
)
DELIVERY_STATUS: Final = _parameter(
    "status", "query", "Only deliveries with this status", type="string", enum=["dead", "pending"], default="dead"
)
START: Final = _parameter(
    "start", "query", "First day (UTC); default: 30 days up to `end`", type="string", schema_format="date"
)
END: Final = _parameter("end", "query", "Last day (UTC); default: today", type="string", schema_format="date")
KEY: Final = _parameter("key", "query", "Id of an API key; default: the caller's. For usage also `all`", type="string")
MODEL: Final = _parameter("model", "query", "Only this model", type="string")
USAGE_FORMAT: Final = _parameter(
    "format", "query", "Format of the answer; default: from the `Accept` header", type="string", enum=["json", "csv"]
)
PURPOSE: Final = _parameter(
    "purpose", "query", "Only files with this purpose", type="string", enum=["batch", "batch_output"]
)
LAST_EVENT_ID: Final = _parameter(
    "Last-Event-ID",
    "header",
    "The same as `starting_after`, and takes precedence: browsers send it when they reconnect",
    type="integer",
    minimum=0,
)
IDEMPOTENCY_KEY: Final = _parameter(
    "Idempotency-Key",
    "header",
    "A key of your choice. A request that repeats it gets the existing job instead of creating a second one; a "
    "different request with the same key is refused",
    type="string",
    maxLength=255,
)
STREAM: Final = _parameter("stream", "query", "Respond with events", type="boolean", default=False)
AFTER_EVENT: Final = _parameter(
    "starting_after", "query", "`sequence_number` of the last event received", type="integer", minimum=0
)
INCLUDE: Final = tuple(
    _parameter(name, "query", "Accepted for compatibility; has no effect", type="array", items=Schema(type="string"))
    for name in ("include", "include[]")
)
OBFUSCATION: Final = _parameter(
    "include_obfuscation", "query", "Accepted for compatibility; has no effect", type="string"
)
BETA: Final = _parameter("beta", "query", "Accepted for compatibility; has no effect", type="string")
PREFER: Final = _parameter(
    "Prefer", "header", "`wait=N`: wait up to N seconds for the job to end before responding", type="string"
)

_EVENT_SCHEMAS: Final[Mapping[str, Schema]] = {
    "text/event-stream": Schema(
        type="object",
        properties={name: Schema(type="string") for name in ("id", "event", "data", "retry")},
        description="One event; `data` is JSON",
    ),
    "application/x-ndjson": Schema(type="string", description="One event per line, as JSON"),
}
"""One entry for each of `FORMATS`."""

Content = type[BaseModel] | str | tuple[type[BaseModel] | str, ...] | None
"""The body of a response: JSON of a model, text of a media type, one of several, or none."""


@dataclass(frozen=True, slots=True)
class describe:  # noqa: N801 - used as a decorator
    """Documents a view function. The function's docstring is the long description.

    Attributes:
        summary: one line, in the imperative.
        responses: contents of the responses, by status.
        body: model of the request body.
        form: fields of the multipart form, if the body is one.
        required: the fields that the form must have.
        streams: media types of the streams of events with which the route can respond.
        errors: further error statuses, in addition to those that all routes have.
        parameters: query parameters and headers.
        listed: whether the OpenAPI document has the route. Files of the documentation page are no part of the API.
    """

    summary: str
    _: KW_ONLY
    responses: Mapping[int, Content]
    body: type[BaseModel] | None = None
    form: Mapping[str, Schema] | None = None
    required: tuple[str, ...] = ()
    streams: Collection[str] = ()
    errors: tuple[int, ...] = ()
    parameters: tuple[Parameter, ...] = ()
    listed: bool = True

    def __call__(self, view: Callable[P, R]) -> Callable[P, R]:
        """Attach the documentation to the function."""
        setattr(view, _ATTRIBUTE, self)
        return view


def _description(view: Callable[..., object]) -> describe:
    description: describe = getattr(view, _ATTRIBUTE)
    return description


def query_names(view: Callable[..., object]) -> frozenset[str]:
    """Return the names of a view's query parameters."""
    return frozenset(parameter.name for parameter in _description(view).parameters if parameter.param_in == "query")


@lru_cache(maxsize=1)
def document(app: Flask) -> str:
    """Return the OpenAPI document of all routes of an application, as JSON."""
    openapi = OpenAPI(
        openapi="3.1.0",
        info=Info(title="mlxq", version=VERSION, description=DESCRIPTION),
        paths=_paths(app),
        tags=[Tag(name=name, description=TAGS[name]) for name in app.blueprints if name in TAGS],
        components=Components(
            securitySchemes={
                "ApiKey": SecurityScheme(type="apiKey", name="X-API-Key", security_scheme_in="header"),
                "Bearer": SecurityScheme(type="http", scheme="bearer"),
            }
        ),
    )
    return construct_open_api_with_schema_class(openapi).model_dump_json(by_alias=True, exclude_none=True)


def _paths(app: Flask) -> dict[str, PathItem]:
    paths: dict[str, PathItem] = {}
    for rule in app.url_map.iter_rules():
        if not _description(app.view_functions[rule.endpoint]).listed:
            continue
        item = paths.setdefault(re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule), PathItem())
        for method in _methods(rule):
            setattr(item, method.lower(), _operation(app, rule, method))
    return paths


def _methods(rule: Rule) -> list[str]:
    return sorted((rule.methods or set()) - {"HEAD", "OPTIONS"})


def _operation(app: Flask, rule: Rule, method: str) -> Operation:
    view = app.view_functions[rule.endpoint]
    description = _description(view)
    tag = rule.endpoint.split(".")[0]
    public = tag in PUBLIC_BLUEPRINTS
    return Operation(
        operationId=view.__name__ if len(_methods(rule)) == 1 else f"{view.__name__}_{method.lower()}",
        tags=[tag],
        summary=description.summary,
        description=inspect.getdoc(view),
        parameters=[*_path_parameters(rule), *description.parameters] or None,
        requestBody=_form_body(description) if description.form else _request_body(description.body),
        responses=dict(_responses(description, rule.rule, public=public)),
        security=None if public else [{"ApiKey": []}, {"Bearer": []}],
    )


def _path_parameters(rule: Rule) -> list[Parameter]:
    return [
        Parameter(name=name, **{"in": "path"}, required=True, param_schema=Schema(type="string"))
        for name in sorted(rule.arguments)
    ]


def _request_body(model: type[BaseModel] | None) -> RequestBody | None:
    if model is None:
        return None
    # Swagger UI would otherwise make an example with all fields, some of which exclude each other.
    example = EXAMPLES["JobRequest" if issubclass(model, JobRequest) else model.__name__]
    content = {"application/json": _media_type(model).model_copy(update={"example": example})}
    if issubclass(model, JobRequest):
        content["multipart/form-data"] = MediaType(
            media_type_schema=_form_schema(model),
            encoding={"request": Encoding(contentType="application/json")},
            example={"request": example},
        )
    return RequestBody(required=True, content=content)


def _form_body(description: describe) -> RequestBody:
    fields = dict(description.form or {})
    schema = Schema(type="object", required=[*description.required], properties=fields, additionalProperties=False)
    return RequestBody(required=True, content={"multipart/form-data": MediaType(media_type_schema=schema)})


def _form_schema(model: type[BaseModel]) -> Schema:
    return Schema(
        type="object",
        required=["request"],
        properties={
            "request": PydanticSchema(schema_class=model),
            "images": Schema(
                type="array",
                items=Schema(type="string", schema_format="binary"),
                description="Image files; they come after the images in the request's field `images`",
            ),
        },
    )


def _responses(description: describe, path: str, *, public: bool) -> Iterator[tuple[str, Response]]:
    errors = {*description.errors, *_COMMON_ERRORS, *(() if public else _ERRORS_WITH_KEY)} - set(description.responses)
    if anthropic_errors.is_expected(path):
        yield from _anthropic_errors(errors)
    else:
        openai = openai_errors.is_expected(path)
        statuses = {*map(openai_errors.status_of, errors)} if openai else errors
        yield from ((str(status), _error_response(status, openai=openai)) for status in sorted(statuses))
    for status, content in description.responses.items():
        yield str(status), Response(description=HTTPStatus(status).phrase, content=_content(content))
    if description.streams:
        events = {name: MediaType(media_type_schema=_EVENT_SCHEMAS[name]) for name in description.streams}
        whole = _content(description.responses.get(200)) or {}
        meaning = "The result, or a stream of events" if whole else "A stream of events"
        yield "200", Response(description=meaning, content={**whole, **events})


def _error_response(status: int, *, openai: bool) -> Response:
    natives = [native for native in ERROR_CODES if status == (openai_errors.status_of(native) if openai else native)]
    codes = ", ".join(f"`{code}`" for native in natives for code in ERROR_CODES[native])
    return Response(
        description=f"{HTTPStatus(status).phrase}: {codes}",
        headers=dict(_RETRY_AFTER) if status in (429, 503) else None,
        content=_content(OpenAIError) if openai else {MEDIA_TYPE: _media_type(ProblemDetails)},
    )


def _anthropic_errors(statuses: Iterable[int]) -> Iterator[tuple[str, Response]]:
    """Yield the errors of a route of the Messages API, whose format has no codes."""
    for status in sorted({*map(anthropic_errors.status_of, statuses)}):
        overloaded = status == anthropic_errors.OVERLOADED
        description = "Overloaded" if overloaded else HTTPStatus(status).phrase
        headers = dict(_RETRY_AFTER) if overloaded or status == HTTPStatus.TOO_MANY_REQUESTS else None
        yield str(status), Response(description=description, headers=headers, content=_content(AnthropicError))


def _content(content: Content) -> dict[str, MediaType] | None:
    if content is None:
        return None
    if isinstance(content, tuple):
        return {name: media for each in content for name, media in (_content(each) or {}).items()}
    if isinstance(content, str):
        return {content: _media_type(None)}
    return {"application/json": _media_type(content)}


def _media_type(model: type[BaseModel] | None) -> MediaType:
    return MediaType(media_type_schema=PydanticSchema(schema_class=model) if model else Schema(type="string"))
