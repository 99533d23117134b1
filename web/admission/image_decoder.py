"""Check an image file by decoding it, so that a broken one is refused at submission instead of failing its job.

Untrusted files can cost far more to decode than to send: a few bytes may unpack to gigabytes of pixels, and a JPEG may
repeat its scans thousands of times. Both are refused before decoding.
"""

from __future__ import annotations

import re
from io import BytesIO
from typing import Final

from PIL import Image, UnidentifiedImageError

from shared.errors import Invalid, MlxqError
from shared.models.image_geometry import MAX_ASPECT_RATIO

Image.MAX_IMAGE_PIXELS = None  # this module has its own limit, applied before an image is unpacked

FORMATS: Final = ("PNG", "JPEG", "WEBP", "GIF")
_ORIENTATION, _SIDEWAYS = 0x0112, (5, 6, 7, 8)
"""The EXIF tag, and its values that exchange width and height."""
_PNG: Final = b"\x89PNG\r\n\x1a\n"
_JPEG: Final = b"\xff\xd8\xff"
_MARKER: Final = re.compile(rb"\xff([\xc0-\xc7\xc9-\xcf\xd9-\xef\xfe])")
"""JPEG markers that begin a segment with a length, or end the image. Decoders skip all others, or stop at them."""
_SCAN, _END = b"\xda", b"\xd9"
_MAX_SCANS, _MAX_SEGMENTS = 50, 1000
"""Limits for a JPEG. Programs write about a dozen of each, and some hundred with a color profile or a second image."""


def decoded_size(data: bytes, max_pixels: int) -> tuple[int, int]:
    """Decode the first frame of an image; return its width and height in pixels, with its EXIF orientation applied.

    Raises:
        Invalid: the file is not an image in one of `FORMATS`, is broken, or has too many pixels or too long a side.
    """
    if data.startswith(_JPEG) and _has_too_many_segments(data):
        raise Invalid("The image is broken: it has too many JPEG scans or segments.", code="image_broken")
    try:
        return _decoded_size(data, max_pixels)
    except UnidentifiedImageError as error:
        raise Invalid(f"The image format must be one of {', '.join(FORMATS)}.", code="image_format") from error
    except MlxqError:
        raise
    except Exception as error:  # decoders raise any exception if the data is invalid
        raise Invalid("The image is broken: it cannot be decoded.", code="image_broken") from error


def _decoded_size(data: bytes, max_pixels: int) -> tuple[int, int]:
    with Image.open(BytesIO(data), formats=FORMATS) as image:
        width, height = image.size
        _check_size(width, height, max_pixels)
        image.load()
        if data.startswith(_PNG):  # decoding does not verify all checksums
            with Image.open(BytesIO(data), formats=("PNG",)) as unread:
                unread.verify()
        sideways = image.getexif().get(_ORIENTATION) in _SIDEWAYS
    return (height, width) if sideways else (width, height)


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        detail = f"The image has {width} x {height} pixels; at most {max_pixels:,} are allowed."
        raise Invalid(detail, code="image_too_many_pixels")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        detail = f"The image has {width} x {height} pixels: a side can be at most {MAX_ASPECT_RATIO} times the other."
        raise Invalid(detail, code="image_shape")


def _has_too_many_segments(jpeg: bytes) -> bool:
    """Whether a JPEG has more scans or segments than any real image.

    A decoder processes the whole image for each scan, and all previous segments for each segment. A small file could
    take an hour.
    """
    position = scans = 0
    for _ in range(_MAX_SEGMENTS):
        marker = _MARKER.search(jpeg, position)
        if marker is None or (marker[1] == _END and scans):
            return False
        scans += marker[1] == _SCAN
        if scans > _MAX_SCANS:
            return True
        position = marker.end()
        position += 0 if marker[1] == _END else int.from_bytes(jpeg[position : position + 2])
    return True
