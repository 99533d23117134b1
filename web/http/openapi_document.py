"""The OpenAPI document of the API, generated from the descriptions that the routes carry (`web.http.openapi`).

Imported only when the document is requested: importing openapi-pydantic takes a sixth of the start of a process.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from http import HTTPStatus
from typing import Final

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
from web.http import anthropic_errors, openai_errors, openapi
from web.http.openapi import description_of
from web.http.openapi_texts import DESCRIPTION, ERROR_CODES, EXAMPLES, TAGS
from web.schemas.problems import MEDIA_TYPE, AnthropicError, OpenAIError, ProblemDetails
from web.schemas.requests import JobRequest

_COMMON_ERRORS: Final = (400, 408, 429, 431, 500, 503)
"""Error statuses that every route may return."""
_ERRORS_WITH_KEY: Final = (401, 403, 422)
"""Error statuses that every route with authentication may return in addition."""
_RETRY_AFTER: Final = {
    "Retry-After": Header(description="Seconds to wait before trying again", param_schema=Schema(type="integer"))
}

_EVENT_SCHEMAS: Final[Mapping[str, Schema]] = {
    "text/event-stream": Schema(
        type="object",
        properties={name: Schema(type="string") for name in ("id", "event", "data", "retry")},
        description="One event; `data` is JSON",
    ),
    "application/x-ndjson": Schema(type="string", description="One event per line, as JSON"),
}
"""One entry for each of `FORMATS`."""


@lru_cache(maxsize=1)
def document(app: Flask) -> str:
    """Return the OpenAPI document of all routes of an application, as JSON."""
    whole = OpenAPI(
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
    return construct_open_api_with_schema_class(whole).model_dump_json(by_alias=True, exclude_none=True)


def _paths(app: Flask) -> dict[str, PathItem]:
    paths: dict[str, PathItem] = {}
    for rule in app.url_map.iter_rules():
        if not description_of(app.view_functions[rule.endpoint]).listed:
            continue
        item = paths.setdefault(re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule), PathItem())
        for method in _methods(rule):
            setattr(item, method.lower(), _operation(app, rule, method))
    return paths


def _methods(rule: Rule) -> list[str]:
    return sorted((rule.methods or set()) - {"HEAD", "OPTIONS"})


def _operation(app: Flask, rule: Rule, method: str) -> Operation:
    view = app.view_functions[rule.endpoint]
    description = description_of(view)
    tag = rule.endpoint.split(".")[0]
    public = tag in PUBLIC_BLUEPRINTS
    return Operation(
        operationId=view.__name__ if len(_methods(rule)) == 1 else f"{view.__name__}_{method.lower()}",
        tags=[tag],
        summary=description.summary,
        description=inspect.getdoc(view),
        parameters=[*_path_parameters(rule), *map(_parameter, description.parameters)] or None,
        requestBody=_form_body(description) if description.form else _request_body(description.body),
        responses=dict(_responses(description, rule.rule, public=public)),
        security=None if public else [{"ApiKey": []}, {"Bearer": []}],
    )


def _parameter(described: openapi.Parameter) -> Parameter:
    schema = Schema.model_validate(described.schema)
    return Parameter(
        name=described.name, **{"in": described.location}, description=described.description, param_schema=schema
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


def _form_body(description: openapi.describe) -> RequestBody:
    fields = {name: Schema.model_validate(schema) for name, schema in (description.form or {}).items()}
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


def _responses(description: openapi.describe, path: str, *, public: bool) -> Iterator[tuple[str, Response]]:
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


def _content(content: openapi.Content) -> dict[str, MediaType] | None:
    if content is None:
        return None
    if isinstance(content, tuple):
        return {name: media for each in content for name, media in (_content(each) or {}).items()}
    if isinstance(content, str):
        return {content: _media_type(None)}
    return {"application/json": _media_type(content)}


def _media_type(model: type[BaseModel] | None) -> MediaType:
    return MediaType(media_type_schema=PydanticSchema(schema_class=model) if model else Schema(type="string"))
