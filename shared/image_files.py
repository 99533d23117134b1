"""Open image files of unknown origin. The API checks images with it, and workers decode them with it.

Both accept the same formats, and compare the size in the header with a limit before a decoder allocates memory: Pillow
allocates several copies of a WebP's canvas when it opens the file, and a file of 136 bytes may have a canvas of 33
million pixels.
"""

from __future__ import annotations

from io import BytesIO
from typing import Final

from PIL import Image

Image.MAX_IMAGE_PIXELS = None  # callers pass their own limit

FORMATS: Final = ("PNG", "JPEG", "WEBP", "GIF")
_ANIMATION, _ALPHA = 0x02, 0x10
"""Flags in the header of a WebP."""


class TooManyPixels(ValueError):
    """An image has more pixels than allowed."""

    def __init__(self, width: int, height: int, allowed: int) -> None:
        super().__init__(f"The image has {width} x {height} pixels; at most {allowed:,} are allowed.")


def open_image(data: bytes, max_pixels: int) -> Image.Image:
    """Open an image file without decoding it.

    Raises:
        TooManyPixels: the header states more than `max_pixels`.
        PIL.UnidentifiedImageError: the file has none of the `FORMATS`.
        Exception: any other; decoders raise any exception if the data is invalid.
    """
    if size := webp_size(data):
        _check_pixels(*size, max_pixels)
    image = Image.open(BytesIO(_with_alpha_flag(data) if size else data), formats=FORMATS)
    _check_pixels(*image.size, max_pixels)
    return image


def media_type(data: bytes) -> str:
    """Return the media type of an image file of one of the `FORMATS`, by its first bytes."""
    signatures = {b"\x89PNG": "image/png", b"\xff\xd8": "image/jpeg", b"GIF8": "image/gif", b"RIFF": "image/webp"}
    known = (kind for signature, kind in signatures.items() if data.startswith(signature))
    return next(known, "application/octet-stream")


def webp_size(data: bytes) -> tuple[int, int] | None:
    """Return the width and height of the canvas in the header of a WebP file; None if the data has no such header."""
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP" or len(data) < 30:
        return None
    match data[12:16]:
        case b"VP8X":
            return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
        case b"VP8L":
            bits = int.from_bytes(data[21:25], "little")
            return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        case b"VP8 ":
            return int.from_bytes(data[26:28], "little") & 0x3FFF, int.from_bytes(data[28:30], "little") & 0x3FFF
        case _:
            return None


def _with_alpha_flag(webp: bytes) -> bytes:
    """Set the flag of an animated WebP that says that it has transparent pixels.

    libwebp writes animations without it if the last frame is opaque. Pillow then drops the transparency of all frames.
    """
    animated = webp[12:16] == b"VP8X" and webp[20] & _ANIMATION
    return webp[:20] + bytes([webp[20] | _ALPHA]) + webp[21:] if animated else webp


def _check_pixels(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise TooManyPixels(width, height, max_pixels)
