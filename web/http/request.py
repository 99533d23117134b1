"""Reading a request: its body, and the headers and parameters that several routes know."""

from __future__ import annotations

import json
import re
from typing import Any, Final, NoReturn, TypeVar

from flask import current_app, request
from pydantic import BaseModel

from shared.errors import BadRequest, Invalid, TooLarge, UnsupportedMedia
from web.access.auth import is_open
from web.http.openapi import query_names
from web.http.threadpool import run_in_threadpool

_REQUEST, _FILES = "request", "images"
"""Fields of a form."""
_UNREADABLE: Final = "\ufffd"
"""What werkzeug puts where a field's bytes are no text."""

Model = TypeVar("Model", bound=BaseModel)

_IDEMPOTENCY_KEY: Final = re.compile(r"[\x21-\x7e]{1,255}")
_MOST_NAMES: Final = 1000
"""Names in one object. Each that nobody knows is an error of its own, and a body has room for a million."""
_PREFER_WAIT: Final = re.compile(r"(?:^|[,;])\s*wait\s*=\s*\"?(\d{1,9})\"?\s*(?:$|[,;])", re.IGNORECASE)


def read_body(model: type[Model]) -> Model:
    """The body as a model.

    Raises:
        TooLarge: it is over the limit.
        UnsupportedMedia: it is not declared as JSON.
        BadRequest: it is not JSON.
        pydantic.ValidationError: it does not fit.
    """
    if request.mimetype == "multipart/form-data":
        body = _from_form()
    elif request.is_json:
        body = _whole()
    else:
        raise UnsupportedMedia(
            "Send the body as application/json, or with files as multipart/form-data.", field="Content-Type"
        )
    return run_in_threadpool(len(body), lambda: model.model_validate(_parse(body)))


def uploads() -> list[bytes]:
    """The files of a form, those of its field `images`, in order; none of another body.

    Raises:
        Invalid: there are files in another field.
    """
    if request.mimetype != "multipart/form-data":
        return []
    if strange := next((name for name in request.files if name not in (_FILES, _REQUEST)), None):
        raise Invalid(f"Files belong in the field {_FILES}.", field=strange)
    return [file.read() for file in request.files.getlist(_FILES)]


def _from_form() -> bytes:
    """The JSON body in the form's field `request`, which may be a file."""
    if strange := next((name for name in request.form if name != _REQUEST), None):
        raise Invalid(f"A form has the fields {_REQUEST} (JSON) and {_FILES} (files).", field=strange)
    texts = request.form.getlist(_REQUEST)
    if any(_UNREADABLE in text for text in texts):
        detail = "The form's request is not UTF-8. One that means to have U+FFFD is sent as a file."
        raise BadRequest(detail, code="invalid_utf8", field=_REQUEST)
    found = [text.encode() for text in texts]
    found += [file.read() for file in request.files.getlist(_REQUEST)]
    if len(found) != 1:
        raise Invalid(f"A form has one request, a JSON object, and not {len(found)}.", field=_REQUEST)
    return found[0]


def _whole() -> bytes:
    body = request.get_data(cache=True)
    # Of a body sent without its length, werkzeug reads as much as is allowed and does not tell that there is more.
    if request.content_length is None and len(body) >= (request.max_content_length or len(body) + 1):
        raise TooLarge("The body is larger than this service accepts.")
    return body


def _parse(body: bytes) -> dict[str, Any]:
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise BadRequest(f"The body is not UTF-8 (byte {error.start}).", code="invalid_utf8") from error
    try:
        data = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_no_duplicates)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise BadRequest(f"The body is not JSON: {error.msg} ({where}).", code="invalid_json") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, nesting without end
        raise BadRequest("The body holds a value that cannot be read.", code="invalid_json") from error
    if not isinstance(data, dict):
        raise BadRequest("The body is not a JSON object.", code="invalid_json")
    return data


def _no_constant(name: str) -> NoReturn:
    raise BadRequest(f"The body is not JSON: {name} is not a JSON number.", code="invalid_json")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > _MOST_NAMES:
        raise BadRequest(f"The body has an object of more than {_MOST_NAMES} names.", code="invalid_json")
    data = dict(pairs)
    if len(data) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        shown = twice.encode(errors="replace").decode()  # it may hold half a character
        raise BadRequest("The body has a name twice in one object.", code="invalid_json", field=shown)
    return data


def idempotency_key() -> str:
    """The Idempotency-Key header; empty when there is none.

    Raises:
        Invalid: it is not 1 to 255 visible ASCII characters.
    """
    key = request.headers.get("Idempotency-Key")
    if key is None:
        return ""
    if not _IDEMPOTENCY_KEY.fullmatch(key):
        raise Invalid("1 to 255 visible ASCII characters are needed.", field="Idempotency-Key")
    return key


def preferred_wait_s(most: float) -> float:
    """N of `Prefer: wait=N` (RFC 7240), at most the service's longest wait. What cannot be met is ignored."""
    match = _PREFER_WAIT.search(",".join(request.headers.getlist("Prefer")))
    return min(float(match[1]), most) if match else 0.0


def wait_s(most: float) -> float:
    """The parameter `wait`, in seconds, but at most the service's longest wait; 0 when absent.

    Raises:
        Invalid: not a number, or below 0.
    """
    text = request.args.get("wait", "0")
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not seconds >= 0:  # NaN neither
        raise Invalid("A number of seconds from 0 on is needed.", field="wait")
    return min(seconds, most)


def whole_number(name: str, text: str, least: int = 0, most: int = 2**53) -> int:
    """A parameter or header as a number.

    Raises:
        Invalid: it is none, or out of range.
    """
    if not (text.isascii() and text.isdecimal() and len(text) <= 16 and least <= int(text) <= most):
        raise Invalid(f"A whole number from {least} to {most} is needed.", field=name)
    return int(text)


def refuse_unknown_parameters() -> None:
    """Look at the request's parameters.

    Raises:
        Invalid: the route knows no such parameter. A filter that is silently ignored would be taken for one that works.
    """
    if request.endpoint is None or not request.args or is_open():
        return
    known = query_names(current_app.view_functions[request.endpoint])
    for name in request.args:
        if name not in known:
            raise Invalid("There is no such parameter.", code="unknown_parameter", field=name[:64])
