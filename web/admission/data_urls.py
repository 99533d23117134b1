"""Data URLs (RFC 2397), read as leniently as browsers and OpenAI's API read them.

Programs write base64 in many ways: with line breaks, without padding, with the URL-safe alphabet, percent-encoded.
"""

from __future__ import annotations

import base64
import binascii
import re
from typing import Final
from urllib.parse import unquote_to_bytes

from shared.errors import Invalid

_HEAD: Final = re.compile(r'\s*data:[^,;"]*((?:;(?:[^,;"]|"[^"]*")*)*),', re.IGNORECASE)
"""Media type and parameters. A quoted value may contain commas and semicolons."""
_MAX_HEAD: Final = 1024
"""Maximum characters before the comma. Searching a whole URL that has no comma would take seconds."""
_WHITE_SPACE: Final = b" \t\r\n\f\v"
_STANDARD_ALPHABET: Final = bytes.maketrans(b"-_", b"+/")


def is_data_url(url: str) -> bool:
    """Whether a URL has the scheme `data`."""
    return url[:32].lstrip()[:5].lower() == "data:"


def decode_data_url(url: str) -> bytes:
    """Return the content of a data URL.

    Raises:
        Invalid: the URL is malformed.
    """
    head = _HEAD.match(url, 0, _MAX_HEAD)
    if head is None:
        raise Invalid("The data URL must have the form data:image/png;base64,….", code="image_broken")
    content = unquote_to_bytes(url[head.end() :])
    is_base64 = head[1].rpartition(";")[2].strip().lower() == "base64"
    return _from_base64(content) if is_base64 else content


def _from_base64(content: bytes) -> bytes:
    text = content.translate(_STANDARD_ALPHABET, _WHITE_SPACE).rstrip(b"=")
    if len(text) % 4 == 1:
        detail = "The base64 of the data URL is incomplete: its length is not possible. Perhaps it was cut."
        raise Invalid(detail, code="image_broken")
    try:
        return base64.b64decode(text + b"=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        detail = "The data URL has a character that base64 does not have."
        raise Invalid(detail, code="image_broken") from error
