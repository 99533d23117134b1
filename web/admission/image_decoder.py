"""Check an image file by decoding it, so that a broken one is refused at submission instead of failing its job.

Untrusted files can cost far more to decode than to send: a few bytes may unpack to gigabytes of pixels, and a JPEG may
repeat its scans thousands of times. Both are refused before decoding.
"""

from __future__ import annotations

import re
from typing import Final

from PIL import UnidentifiedImageError

from shared.errors import Invalid, MlxqError
from shared.image_files import FORMATS, TooManyPixels, open_image, webp_size
from shared.models.image_geometry import MAX_ASPECT_RATIO

_WEBP_DIVISOR: Final = 2
"""A WebP may have a half of the allowed pixels, because decoding one takes 17 bytes per pixel; others take 4 to 8."""
_ORIENTATION, _SIDEWAYS = 0x0112, (5, 6, 7, 8)
"""The EXIF tag, and its values that exchange width and height."""
_PNG: Final = b"\x89PNG\r\n\x1a\n"
_JPEG: Final = b"\xff\xd8\xff"
_STARTS: Final = {"PNG": _PNG, "JPEG": _JPEG, "GIF": b"GIF8"}
_MARKER: Final = re.compile(rb"\xff([\xc0-\xc7\xc9-\xcf\xd9-\xef\xfe])")
"""JPEG markers that begin a segment with a length, or end the image. Decoders skip all others, or stop at them."""
_SCAN, _END = b"\xda", b"\xd9"
_MAX_SCANS, _MAX_SEGMENTS = 50, 1000
"""Limits for a JPEG. Programs write about a dozen of each, and some hundred with a color profile or a second image."""
_OTHER_FORMATS: Final = {
    "BMP": re.compile(rb"BM"),
    "TIFF": re.compile(rb"II\*\0|MM\0\*"),
    "HEIC or AVIF": re.compile(rb".{4}ftyp(?:hei|hev|mif|msf|avif|avis)", re.DOTALL),
    "JPEG XL": re.compile(rb"\xff\x0a|\0\0\0\x0cJXL "),
    "JPEG 2000": re.compile(rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51"),
    "ICO": re.compile(rb"\0\0\x01\0"),
    "PDF": re.compile(rb"%PDF-"),
    "SVG": re.compile(
        rb"(?:\xef\xbb\xbf)?\s*(?:<\?xml[^>]*>\s*)?(?:<!--.{0,500}?-->\s*|<!DOCTYPE[^>]*>\s*)*<svg", re.DOTALL
    ),
}
"""The beginning of files that users send although no model gets them, to name the format in the error."""
_SNIFFED: Final = 1024
_INCOMPLETE: Final = re.compile(r"truncated|not enough image data|no image data|unexpected end|EOF", re.IGNORECASE)
"""Messages of Pillow for files that end too early."""


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
        raise _unidentified(data) from error
    except TooManyPixels as error:
        raise Invalid(str(error), code="image_too_many_pixels") from error
    except MlxqError:
        raise
    except Exception as error:  # decoders raise any exception if the data is invalid
        incomplete = _INCOMPLETE.search(str(error))
        reason = "it ends too early; perhaps it was sent incompletely" if incomplete else "it cannot be decoded"
        raise Invalid(f"The image is broken: {reason}.", code="image_broken") from error


def _unidentified(data: bytes) -> Invalid:
    """Return the error for a file that Pillow does not recognise as one of `FORMATS`."""
    formats = f"Send {', '.join(FORMATS[:-1])} or {FORMATS[-1]}."
    if found := _format(data):
        return Invalid(f"The image is broken: its {found} header cannot be read.", code="image_broken")
    other = next((name for name, start in _OTHER_FORMATS.items() if start.match(data[:_SNIFFED])), None)
    problem = f"The file is {other}, which models do not get." if other else "The file is not an image."
    return Invalid(f"{problem} {formats}", code="image_format")


def _format(data: bytes) -> str | None:
    """Return which of `FORMATS` a file begins like."""
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WEBP"
    return next((name for name, start in _STARTS.items() if data.startswith(start)), None)


def _decoded_size(data: bytes, max_pixels: int) -> tuple[int, int]:
    allowed = max(max_pixels // _WEBP_DIVISOR, 1) if webp_size(data) else max_pixels
    with open_image(data, allowed) as image:
        width, height = image.size
        _check_shape(width, height)
        image.load()
        if data.startswith(_PNG):  # decoding does not verify all checksums
            with open_image(data, allowed) as unread:
                unread.verify()
        sideways = image.getexif().get(_ORIENTATION) in _SIDEWAYS
    return (height, width) if sideways else (width, height)


def _check_shape(width: int, height: int) -> None:
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
