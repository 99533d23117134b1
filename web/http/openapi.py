"""Descriptions of routes, from which `web.http.openapi_document` makes the OpenAPI document."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, Final, ParamSpec, TypeVar

from pydantic import BaseModel

P = ParamSpec("P")
R = TypeVar("R")

_ATTRIBUTE: Final = "openapi"


@dataclass(frozen=True, slots=True)
class Parameter:
    """A query parameter or a header.

    Attributes:
        location: `query` or `header`.
        schema: its JSON Schema.
    """

    name: str
    location: str
    description: str
    schema: Mapping[str, Any]


def _parameter(name: str, location: str, description: str, **schema: Any) -> Parameter:
    return Parameter(name, location, description, schema)


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
    "start", "query", "First day (UTC); default: 30 days up to `end`", type="string", format="date"
)
END: Final = _parameter("end", "query", "Last day (UTC); default: today", type="string", format="date")
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
    _parameter(name, "query", "Accepted for compatibility; has no effect", type="array", items={"type": "string"})
    for name in ("include", "include[]")
)
OBFUSCATION: Final = _parameter(
    "include_obfuscation", "query", "Accepted for compatibility; has no effect", type="string"
)
BETA: Final = _parameter("beta", "query", "Accepted for compatibility; has no effect", type="string")
PREFER: Final = _parameter(
    "Prefer", "header", "`wait=N`: wait up to N seconds for the job to end before responding", type="string"
)

Content = type[BaseModel] | str | tuple[type[BaseModel] | str, ...] | None
"""The body of a response: JSON of a model, text of a media type, one of several, or none."""


@dataclass(frozen=True, slots=True)
class describe:  # noqa: N801 - used as a decorator
    """Documents a view function. The function's docstring is the long description.

    Attributes:
        summary: one line, in the imperative.
        responses: contents of the responses, by status.
        body: model of the request body.
        form: JSON Schemas of the fields of the multipart form, if the body is one.
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
    form: Mapping[str, Mapping[str, Any]] | None = None
    required: tuple[str, ...] = ()
    streams: Collection[str] = ()
    errors: tuple[int, ...] = ()
    parameters: tuple[Parameter, ...] = ()
    listed: bool = True

    def __call__(self, view: Callable[P, R]) -> Callable[P, R]:
        """Attach the documentation to the function."""
        setattr(view, _ATTRIBUTE, self)
        return view


def description_of(view: Callable[..., object]) -> describe:
    """Return what `describe` has attached to a view function."""
    description: describe = getattr(view, _ATTRIBUTE)
    return description


def query_names(view: Callable[..., object]) -> frozenset[str]:
    """Return the names of a view's query parameters."""
    return frozenset(parameter.name for parameter in description_of(view).parameters if parameter.location == "query")
