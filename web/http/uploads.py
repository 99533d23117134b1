"""Receive a multipart form with one large file, which goes to its destination piece by piece.

`web.http.body` holds bodies in memory and counts them; this module holds one piece at a time. A slow client is bounded
by the connection's time limits (`web.http.connection`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from flask import request
from werkzeug.exceptions import RequestEntityTooLarge
from werkzeug.sansio.multipart import Data, Epilogue, Event, Field, File, MultipartDecoder, NeedData

from shared.errors import BadRequest, Invalid, TooLarge, UnsupportedMedia
from web.http.body import MAX_PARTS, bad_form, boundary_of, read_body_piece

_PIECE: Final = 64 * 2**10
_MAX_BUFFER: Final = 4 * _PIECE
"""Maximum bytes that the decoder may hold back: headers of a part, or a possible boundary."""
_MAX_FIELD_BYTES: Final = 8 * 2**10
_OVERHEAD: Final = 64 * 2**10
"""Bytes of a form besides its file."""


@dataclass(frozen=True, slots=True)
class UploadForm:
    """What a form has besides the content of its file."""

    filename: str
    fields: dict[str, str]


def receive_upload(field: str, max_bytes: int, write: Callable[[bytes], object]) -> UploadForm:
    """Receive the form of the current request.

    Args:
        field: name of the form field with the file.
        max_bytes: maximum size of the file.
        write: receives the file's content.

    Raises:
        UnsupportedMedia: the body is not a multipart form, or is compressed.
        BadRequest: the form is malformed.
        Invalid: it has a field twice, another file, or no file.
        TooLarge: the file is too large.
        RequestTimeout: the body arrives too slowly.
    """
    if request.mimetype != "multipart/form-data":
        raise UnsupportedMedia("Send the file as multipart/form-data.", field="Content-Type")
    if request.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise UnsupportedMedia("Send the body without compression.", field="Content-Encoding")
    if (request.content_length or 0) > max_bytes + _OVERHEAD:
        raise _too_large(max_bytes)
    reader = _Reader(field, max_bytes, write)
    try:
        for event in _events(boundary_of(request.content_type or "")):
            reader.take(event)
    except RequestEntityTooLarge:
        raise bad_form(f"it has more than {MAX_PARTS} parts, or a part with too long headers") from None
    except (ValueError, AttributeError) as error:  # AttributeError: werkzeug's decoder, for a part without a line break
        raise bad_form("it cannot be parsed") from error
    return reader.form()


def _events(boundary: bytes) -> Iterator[Event]:
    """Yield the parts of the body as they arrive."""
    decoder = MultipartDecoder(boundary, _MAX_BUFFER, max_parts=MAX_PARTS)
    left = request.content_length
    while True:
        event = decoder.next_event()
        if isinstance(event, Epilogue):
            return
        if not isinstance(event, NeedData):
            yield event
            continue
        piece = read_body_piece(_PIECE if left is None else min(_PIECE, left))
        left = None if left is None else left - len(piece)
        if not piece and left:
            raise BadRequest("The body ends before its Content-Length.")
        decoder.receive_data(piece or None)


class _Reader:
    """Takes the events of a form."""

    def __init__(self, field: str, max_bytes: int, write: Callable[[bytes], object]) -> None:
        self._field = field
        self._max_bytes = max_bytes
        self._write = write
        self._size = 0
        self._filename: str | None = None
        self._fields: dict[str, bytes] = {}
        self._current: str | None = None  # the text field that is being received; None: the file

    def take(self, event: Event) -> None:
        if isinstance(event, File):
            self._begin_file(event)
        elif isinstance(event, Field):
            self._begin_field(event.name)
        elif isinstance(event, Data):
            self._add(event.data)

    def form(self) -> UploadForm:
        if self._filename is None:
            raise Invalid(f"The form has no file {self._field!r}.", field=self._field)
        return UploadForm(self._filename, {name: _text(name, value) for name, value in self._fields.items()})

    def _begin_file(self, event: File) -> None:
        if event.name != self._field or self._filename is not None:
            raise Invalid(f"The form must have one file, with the name {self._field!r}.", field=event.name)
        self._filename, self._current = event.filename, None

    def _begin_field(self, name: str | None) -> None:
        if name is None:
            raise bad_form("a part has no name")
        if name == self._field:
            raise Invalid(f"The field {name!r} must be a file: give it a file name.", field=name)
        if name in self._fields:
            raise Invalid("The form has this field twice.", field=name)
        self._fields[name], self._current = b"", name

    def _add(self, data: bytes) -> None:
        if self._current is not None:
            self._fields[self._current] += data
            if len(self._fields[self._current]) > _MAX_FIELD_BYTES:
                raise Invalid(f"The form field has more than {_MAX_FIELD_BYTES} bytes.", field=self._current)
            return
        self._size += len(data)
        if self._size > self._max_bytes:
            raise _too_large(self._max_bytes)
        self._write(data)


def _text(name: str, value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise BadRequest("The form field is not valid UTF-8.", code="invalid_utf8", field=name) from None


def _too_large(max_bytes: int) -> TooLarge:
    return TooLarge(f"The file has more than {max_bytes:,} bytes (MAX_FILE_BYTES).", field="file")
