"""Receive request bodies: their bytes are counted for the whole process, and their structure is bounded before parsing.

The bytes of a body are counted from their arrival until `release`, by which time the request has been stored.
"""

from __future__ import annotations

import io
import re
from typing import Final

from flask import Flask, current_app, g, request
from gunicorn.http.errors import ParseException  # type: ignore[import-untyped]
from werkzeug.datastructures import FileStorage, MultiDict
from werkzeug.formparser import MultiPartParser
from werkzeug.http import parse_options_header

from shared.errors import BadRequest, TooLarge, Unavailable, UnsupportedMedia

Form = tuple["MultiDict[str, str]", "MultiDict[str, FileStorage]"]

MAX_JSON_VALUES: Final = 100_000
"""Maximum objects, arrays and commas. Parsed, each can take 100 bytes and more, however short it is in the body."""
MAX_JSON_DEPTH: Final = 64
MAX_PARTS: Final = 256
MAX_PART_HEADER_BYTES: Final = 8 * 2**10
_EXTENSION: Final = "body_budget"
_PIECE: Final = 2**20
_RETRY_AFTER_S: Final = 2
_NOT_BRACKETS: Final = bytes(set(range(256)) - set(b"[]{}"))


class BodyBudget:
    """The bytes of request bodies that a process holds at a time."""

    def __init__(self, max_bytes: int) -> None:
        self._free = max_bytes

    def take(self, size: int) -> None:
        """Count bytes.

        Raises:
            Unavailable: there are too many.
        """
        if size > self._free:
            detail = "The service is receiving too many bytes of requests at this moment."
            raise Unavailable(detail, code="too_many_bytes", retry_after=_RETRY_AFTER_S)
        self._free -= size

    def give_back(self, size: int) -> None:
        """Count bytes no longer."""
        self._free += size


def register(app: Flask, max_bytes: int) -> None:
    """Give an application a budget."""
    app.extensions[_EXTENSION] = BodyBudget(max_bytes)
    app.teardown_request(lambda _: release())


def receive() -> bytes:
    """Return the body of the current request.

    Raises:
        UnsupportedMedia: the body is compressed.
        TooLarge: it exceeds the size limit.
        Unavailable: the process holds too many bytes of bodies.
        BadRequest: the body ends early, or is not valid HTTP.
        RequestTimeout: it arrives too slowly.
    """
    if request.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise UnsupportedMedia("Send the body without compression.", field="Content-Encoding")
    limit = current_app.config["MAX_CONTENT_LENGTH"] or 2**63
    if (request.content_length or 0) > limit:
        raise _too_large()
    pieces, size = [], 0
    while piece := _read_counted(min(_PIECE, (request.content_length or limit + 1) - size)):
        size += len(piece)
        if size > limit:
            raise _too_large()
        pieces.append(piece)
    if size < (request.content_length or 0):
        raise BadRequest("The body ends before its Content-Length.")
    return b"".join(pieces)


def release() -> None:
    """Count the body of the current request no longer. Further calls have no effect."""
    _budget().give_back(g.pop("body_bytes", 0))


def parse_form(body: bytes, content_type: str) -> Form:
    """Parse a multipart form; return its text fields and its files.

    Raises:
        BadRequest: it is malformed, has too many parts, or a part has too long headers.
    """
    boundary = boundary_of(content_type)
    _check_parts(body, b"--" + boundary)
    # Without a stream factory, files over 500 kB would go to disk.
    parser = MultiPartParser(stream_factory=_in_memory, max_form_memory_size=len(body))
    try:
        return parser.parse(io.BytesIO(body), boundary, len(body))
    except ValueError as error:
        raise bad_form("it cannot be parsed") from error


def boundary_of(content_type: str) -> bytes:
    """Return the boundary of a multipart form.

    Raises:
        BadRequest: there is no valid one.
    """
    boundary = parse_options_header(content_type)[1].get("boundary", "").encode("latin-1", "replace")
    if not re.fullmatch(rb"[ -~]{0,69}[!-~]", boundary):
        raise bad_form("its Content-Type has no valid boundary")
    return boundary


def check_json(body: bytes) -> None:
    """Refuse JSON that would take far more memory than its text, without parsing it.

    Raises:
        BadRequest: the JSON has too many values, or is nested too deeply.
    """
    unescaped = body.replace(rb"\\", b"").replace(rb"\"", b"")  # after this, every quote begins or ends a string
    if unescaped.count(b'"') > 4 * MAX_JSON_VALUES:
        raise _too_many_values()
    outside = b"".join(unescaped.split(b'"')[::2])
    if sum(outside.count(mark) for mark in (b"[", b"{", b",")) > MAX_JSON_VALUES:
        raise _too_many_values()
    depth = 0
    for bracket in outside.translate(None, _NOT_BRACKETS):
        depth += 1 if bracket in b"[{" else -1
        if depth > MAX_JSON_DEPTH:
            raise BadRequest(f"The body is nested more than {MAX_JSON_DEPTH} levels deep.", code="invalid_json")


def _budget() -> BodyBudget:
    budget: BodyBudget = current_app.extensions[_EXTENSION]
    return budget


def _read_counted(size: int) -> bytes:
    """Read up to `size` bytes. They are counted before they are read, because they can arrive slowly."""
    budget = _budget()
    budget.take(size)
    counted = g.setdefault("body_bytes", 0)
    g.body_bytes = counted + size
    piece = read_body_piece(size)
    g.body_bytes = counted + len(piece)
    budget.give_back(size - len(piece))
    return piece


def read_body_piece(size: int) -> bytes:
    """Read up to `size` bytes of the body of the current request; none at its end.

    Raises:
        BadRequest: the body is not valid HTTP, or ends early.
        RequestTimeout: it arrives too slowly.
    """
    try:
        return request.environ["wsgi.input"].read(size)  # type: ignore[no-any-return]
    except (ParseException, OSError) as error:
        raise BadRequest("The body is not valid HTTP, or ends early.") from error


def _check_parts(body: bytes, delimiter: bytes) -> None:
    """Check what takes werkzeug's parser more than linear time."""
    if body.count(delimiter) > MAX_PARTS + 1:
        raise bad_form(f"it has more than {MAX_PARTS} parts")
    start = body.find(delimiter)
    while start >= 0:
        start += len(delimiter)
        is_last = body.startswith(b"--", start)
        if not is_last and body.find(b"\r\n\r\n", start, start + MAX_PART_HEADER_BYTES) < 0:
            raise bad_form(f"the headers of a part are malformed or longer than {MAX_PART_HEADER_BYTES} bytes")
        start = body.find(delimiter, start)


def _in_memory(*_: object, **__: object) -> io.BytesIO:
    return io.BytesIO()


def _too_large() -> TooLarge:
    return TooLarge("The request body is larger than this service accepts.")


def _too_many_values() -> BadRequest:
    return BadRequest(f"The body has more than {MAX_JSON_VALUES} values.", code="invalid_json")


def bad_form(reason: str) -> BadRequest:
    """Return the error for a malformed multipart form."""
    return BadRequest(f"The body is not a valid multipart form: {reason}.")
