"""The lines of a batch's input file. One line is in memory at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from shared.errors import MlxqError
from web.batches.store import BatchError
from web.http.request import parse_json

MAX_LINES: Final = 50_000
MAX_ERRORS: Final = 100
"""Maximum errors that a failed batch lists."""
MAX_CUSTOM_ID: Final = 512
_FIELDS: Final = frozenset({"custom_id", "method", "url", "body"})
_BOM: Final = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Line:
    """A valid line.

    Attributes:
        number: its number in the file, from 1.
        body: the body of the request.
    """

    number: int
    custom_id: str
    body: dict[str, Any]


class LineInvalid(Exception):
    """A line does not have the format of a request."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.param = param


@dataclass(frozen=True, slots=True)
class Checked:
    """The result of a check of all lines.

    Attributes:
        total: number of requests.
        model: the model that all requests name; None if they name several.
        errors: the first errors.
    """

    total: int
    model: str | None
    errors: tuple[BatchError, ...]


def raw_lines(path: Path, max_bytes: int) -> Iterator[tuple[int, bytes]]:
    """Yield the number and the content of each line that is not blank.

    Of a line with more than `max_bytes`, only `max_bytes + 1` bytes are yielded.
    """
    with path.open("rb") as file:
        number = 0
        while raw := file.readline(max_bytes + 1):
            number += 1
            complete = raw.endswith(b"\n") or len(raw) <= max_bytes
            text = raw.removeprefix(_BOM) if number == 1 else raw
            if text.strip():
                yield number, text
            while not complete:  # skip the rest of a line that is too long
                rest = file.readline(max_bytes)
                complete = not rest or rest.endswith(b"\n")


def parse_line(number: int, raw: bytes, endpoint: str, max_bytes: int) -> Line:
    """Parse a line.

    Raises:
        LineInvalid: it is not a request to the endpoint.
    """
    if len(raw) > max_bytes:
        raise LineInvalid("line_too_large", f"The line has more than {max_bytes:,} bytes (MAX_BODY_BYTES).")
    try:
        data = parse_json(raw.strip())
    except MlxqError as error:
        raise LineInvalid("invalid_json_line", error.detail.replace("The body", "The line"), error.field) from error
    custom_id = data.get("custom_id")
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= MAX_CUSTOM_ID:
        detail = f"custom_id must be a string of 1 to {MAX_CUSTOM_ID} characters."
        raise LineInvalid("invalid_custom_id", detail, "custom_id")
    if data.get("method") != "POST":
        raise LineInvalid("invalid_method", "method must be POST.", "method")
    if data.get("url") != endpoint:
        raise LineInvalid("mismatched_endpoint", f"url must be the batch's endpoint, {endpoint}.", "url")
    if not isinstance(data.get("body"), dict):
        raise LineInvalid("invalid_body", "body must be a JSON object.", "body")
    for name in data.keys() - _FIELDS:
        raise LineInvalid("unknown_parameter", "The line has an unknown field.", name[:64])
    return Line(number, custom_id, data["body"])


def check_lines(path: Path, endpoint: str, max_bytes: int, pause: Callable[[], object] = lambda: None) -> Checked:
    """Check all lines.

    Args:
        pause: called after each line, so that the process can do other things during a large file.
    """
    errors: list[BatchError] = []
    total, models, seen = 0, set[str](), dict[bytes, int]()
    for number, raw in raw_lines(path, max_bytes):
        pause()
        total += 1
        if total > MAX_LINES:
            detail = f"The input file has more than {MAX_LINES:,} requests."
            errors.insert(0, BatchError("too_many_requests", detail, number))
            break
        try:
            line = parse_line(number, raw, endpoint, max_bytes)
            _reject_duplicate(line, seen)
        except LineInvalid as error:
            errors.append(BatchError(error.code, str(error), number, error.param))
        else:
            if len(models) < 2:
                models.add(str(line.body.get("model") or ""))
        if len(errors) >= MAX_ERRORS:
            break
    if not total:
        errors.append(BatchError("empty_file", "The input file has no requests."))
    model = models.pop() if len(models) == 1 else None
    return Checked(total, model or None, tuple(errors))


def _reject_duplicate(line: Line, seen: dict[bytes, int]) -> None:
    digest = hashlib.blake2b(line.custom_id.encode(errors="surrogatepass"), digest_size=12).digest()
    first = seen.setdefault(digest, line.number)
    if first != line.number:
        raise LineInvalid("duplicate_custom_id", f"The custom_id is that of line {first}.", "custom_id")
