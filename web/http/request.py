"""Read request bodies, and the headers and query parameters that several routes have."""

from __future__ import annotations

import json
import re
from typing import Any, Final, NoReturn, TypeVar

from flask import current_app, g, request
from pydantic import BaseModel
from werkzeug.datastructures import FileStorage, MultiDict

from shared.errors import BadRequest, Invalid, UnsupportedMedia
from shared.wire import to_json
from web.access.auth import CONSOLE, is_public_route
from web.http.body import check_json, parse_form, receive
from web.http.openapi import query_names
from web.http.threadpool import run_in_threadpool

_REQUEST_FIELD, _FILES_FIELD = "request", "images"
"""Names of the form fields."""
_UPLOADS: Final = "uploads"
"""Attribute of `flask.g` with the uploaded images."""
_REPLACEMENT_CHARACTER: Final = "\ufffd"
"""werkzeug replaces bytes of form fields that are not UTF-8 with it."""

Model = TypeVar("Model", bound=BaseModel)

_IDEMPOTENCY_KEY: Final = re.compile(r"[\x21-\x7e]{1,255}")
_MAX_NAMES: Final = 1000
"""Maximum names in one JSON object. Every unknown name is a validation error, and a body has space for a million."""
_SURROGATE_ESCAPE: Final = re.compile(r"\\u[dD][89a-fA-F]")
_PREFER_WAIT: Final = re.compile(r"(?:^|[,;])\s*wait\s*=\s*\"?(\d{1,9})\"?\s*(?:$|[,;])", re.IGNORECASE)


def read_body(model: type[Model]) -> Model:
    """Read and validate the request body: JSON, or a form whose field `request` is JSON.

    Raises:
        TooLarge: the body exceeds the size limit.
        UnsupportedMedia: the content type is neither JSON nor a form, or the body is compressed.
        BadRequest: the body is not a JSON object.
        Invalid: the form has unknown fields, or not exactly one field `request`.
        Unavailable: the process holds too many bytes of bodies.
        RequestTimeout: the body arrives too slowly.
        pydantic.ValidationError: a field is invalid.
    """
    is_form = request.mimetype == "multipart/form-data"
    if not (is_form or request.is_json):
        detail = "Send the body as application/json, or as multipart/form-data to upload images."
        raise UnsupportedMedia(detail, field="Content-Type")
    body = receive()
    if is_form:
        content_type = request.content_type or ""
        body = _form_json(*run_in_threadpool(len(body), lambda: parse_form(body, content_type)))
    return run_in_threadpool(len(body), lambda: model.model_validate(parse_json(body)))


def uploads() -> list[bytes]:
    """Return the files in the form field `images`, in order; an empty list if the body is not a form."""
    files: list[FileStorage] = g.pop(_UPLOADS, [])
    return [file.read() for file in files]


def _form_json(fields: MultiDict[str, str], files: MultiDict[str, FileStorage]) -> bytes:
    """Return the JSON in the form field `request`, which may be a text field or a file; keep the uploaded images.

    Raises:
        Invalid: the form has other fields, or not exactly one `request`.
    """
    for name in fields:
        if name != _REQUEST_FIELD:
            detail = (
                f"Unknown form field. A form has the fields {_REQUEST_FIELD!r} (JSON) and {_FILES_FIELD!r} (files)."
            )
            raise Invalid(detail, field=name)
    for name in files:
        if name not in (_FILES_FIELD, _REQUEST_FIELD):
            raise Invalid(f"Upload files in the form field {_FILES_FIELD!r}.", field=name)
    texts = fields.getlist(_REQUEST_FIELD)
    if any(_REPLACEMENT_CHARACTER in text for text in texts):
        detail = "The form field 'request' is not valid UTF-8. To send the character U+FFFD, send the field as a file."
        raise BadRequest(detail, code="invalid_utf8", field=_REQUEST_FIELD)
    values = [text.encode() for text in texts]
    values += [file.read() for file in files.getlist(_REQUEST_FIELD)]
    if len(values) != 1:
        detail = f"A form needs exactly one field {_REQUEST_FIELD!r} with a JSON object; this one has {len(values)}."
        raise Invalid(detail, field=_REQUEST_FIELD)
    setattr(g, _UPLOADS, files.getlist(_FILES_FIELD))
    return values[0]


def parse_json(body: bytes) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        BadRequest: it is not valid, has too many values, has a name twice, or has texts that are not Unicode.
    """
    check_json(body)
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        detail = f"The body is not valid UTF-8 (byte {error.start})."
        raise BadRequest(detail, code="invalid_utf8") from error
    try:
        data = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        position = f"line {error.lineno}, column {error.colno}"
        raise BadRequest(f"The body is not valid JSON: {error.msg} ({position}).", code="invalid_json") from error
    except (ValueError, RecursionError) as error:
        detail = "The body has a number with too many digits or is nested too deeply."
        raise BadRequest(detail, code="invalid_json") from error
    if not isinstance(data, dict):
        raise BadRequest("The body is not a JSON object.", code="invalid_json")
    if _SURROGATE_ESCAPE.search(text) and not _is_unicode(data):
        raise BadRequest("The body has half of a surrogate pair, which is no character.", code="invalid_json")
    return data


def _is_unicode(data: dict[str, Any]) -> bool:
    """Whether the texts can be encoded: JSON can escape single surrogates, but no encoding has them."""
    try:
        to_json(data).encode()
    except UnicodeEncodeError:
        return False
    return True


def _refuse_constant(name: str) -> NoReturn:
    raise BadRequest(f"The body is not valid JSON: {name} is not a JSON number.", code="invalid_json")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object; refuse one with too many names or with a name that occurs twice."""
    if len(pairs) > _MAX_NAMES:
        raise BadRequest(f"The body has an object with more than {_MAX_NAMES} names.", code="invalid_json")
    data = dict(pairs)
    if len(data) < len(pairs):
        names = [name for name, _ in pairs]
        duplicate = next(name for name in names if names.count(name) > 1)
        printable = duplicate.encode(errors="replace").decode()  # it may contain an unpaired surrogate
        raise BadRequest("This name occurs twice in one object.", code="invalid_json", field=printable)
    return data


def idempotency_key() -> str:
    """Return the Idempotency-Key header; empty if it is absent.

    Raises:
        Invalid: the header is not 1 to 255 visible ASCII characters.
    """
    key = request.headers.get("Idempotency-Key")
    if key is None:
        return ""
    if not _IDEMPOTENCY_KEY.fullmatch(key):
        raise Invalid("Idempotency-Key must be 1 to 255 visible ASCII characters.", field="Idempotency-Key")
    return key


def preferred_wait_s(max_wait_s: float) -> float:
    """Return N of the header `Prefer: wait=N` (RFC 7240), limited to `max_wait_s`; 0 if absent or malformed."""
    match = _PREFER_WAIT.search(",".join(request.headers.getlist("Prefer")))
    return min(float(match[1]), max_wait_s) if match else 0.0


def wait_s(max_wait_s: float) -> float:
    """Return the query parameter `wait` in seconds, limited to `max_wait_s`; 0 if absent.

    Raises:
        Invalid: the parameter is not a number or is negative.
    """
    text = request.args.get("wait", "0")
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not seconds >= 0:  # also refuses NaN
        raise Invalid("wait must be a number of seconds, 0 or more.", field="wait")
    return min(seconds, max_wait_s)


def parse_integer(name: str, text: str, minimum: int = 0, maximum: int = 2**53) -> int:
    """Read a query parameter or header as an integer.

    Raises:
        Invalid: the value is not an integer or is out of range.
    """
    valid = text.isascii() and text.isdecimal() and len(text) <= 16 and minimum <= int(text) <= maximum
    if not valid:
        raise Invalid(f"{name} must be an integer from {minimum} to {maximum}.", field=name)
    return int(text)


def refuse_unknown_parameters() -> None:
    """Refuse query parameters that the route does not have.

    A client would take an ignored filter for one that works.

    Raises:
        Invalid: the route has no parameter with this name.
    """
    if request.endpoint is None or not request.args or is_public_route() or request.blueprint == CONSOLE:
        return
    known = query_names(current_app.view_functions[request.endpoint])
    for name in request.args:
        if name not in known:
            detail = f"Unknown query parameter. This route has: {', '.join(sorted(known)) or 'none'}."
            raise Invalid(detail, code="unknown_parameter", field=name[:64])
