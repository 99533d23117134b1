"""Spellings of data URLs, why an image is refused, and what a file may cost before it is refused."""

from __future__ import annotations

import base64
import io
from typing import Any
from urllib.parse import quote

import pytest
from PIL import Image

from shared.errors import Invalid
from shared.image_files import FORMATS, TooManyPixels, open_image
from tests.support.image_files import picture
from web.admission.data_urls import decode_data_url, is_data_url
from web.admission.image_decoder import decoded_size

PIXELS = 7680 * 4320
DATA = bytes(range(256)) + b"?"  # its base64 has every character, and padding
BASE64 = base64.b64encode(DATA).decode()
SPELLINGS = {
    "standard": f"data:image/png;base64,{BASE64}",
    "no media type": f"data:;base64,{BASE64}",
    "upper case": f"DATA:IMAGE/PNG;BASE64,{BASE64}",
    "parameter": f"data:image/png;charset=utf-8;name=a.png;base64,{BASE64}",
    "quoted parameter": f'data:image/png;name="a, b; c.png";base64,{BASE64}',
    "empty parameter": f"data:image/png;;base64,{BASE64}",
    "spaces in the head": f"data: image/png ; base64 ,{BASE64}",
    "white space around": f"\n data:image/png;base64,{BASE64} \n",
    "space after the comma": f"data:image/png;base64, {BASE64}",
    "lines of MIME": "data:image/png;base64," + "\r\n".join(BASE64[i : i + 76] for i in range(0, len(BASE64), 76)),
    "lines of a Unix tool": "data:image/png;base64," + base64.encodebytes(DATA).decode(),
    "tabs and spaces": "data:image/png;base64," + "\t ".join(BASE64),
    "no padding": f"data:image/png;base64,{BASE64.rstrip('=')}",
    "too much padding": f"data:image/png;base64,{BASE64}==",
    "URL-safe": "data:image/png;base64," + base64.urlsafe_b64encode(DATA).decode(),
    "URL-safe without padding": "data:image/png;base64," + base64.urlsafe_b64encode(DATA).decode().rstrip("="),
    "percent-encoded base64": "data:image/png;base64," + quote(BASE64, safe=""),
    "percent-encoded bytes": "data:image/png," + quote(DATA),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_a_data_url_gives_the_same_file(spelling: str) -> None:
    url = SPELLINGS[spelling]
    assert is_data_url(url)
    assert decode_data_url(url) == DATA


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("data:image/png;base64", "must have the form"),
        ("data:image/png;base64,AAAAA", "incomplete"),
        ("data:image/png;base64,AA*A", "character"),
        ("data:image/png;base64,AAé=", "character"),
        ("data:image/png;base64,AA=AAA", "character"),
    ],
)
def test_a_malformed_data_url_is_refused_with_the_reason(url: str, reason: str) -> None:
    with pytest.raises(Invalid, match=reason) as caught:
        decode_data_url(url)
    assert caught.value.code == "image_broken"


def file_of(form: str, **save: Any) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 48), "red").save(file, form, **save)
    return file.getvalue()


OTHER_FORMATS = {
    "BMP": file_of("BMP"), "TIFF": file_of("TIFF"), "ICO": file_of("ICO"), "PDF": b"%PDF-1.7 ...",
    "JPEG 2000": b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG XL": b"\xff\x0a" + bytes(40),
    "HEIC or AVIF": b"\0\0\0\x1cftypavif" + bytes(20),
    "SVG": b'<?xml version="1.0"?>\n<!-- made by hand -->\n<svg xmlns="http://www.w3.org/2000/svg"/>',
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER_FORMATS)
def test_the_error_names_a_format_that_is_not_supported(name: str) -> None:
    with pytest.raises(Invalid, match=f"The file is {name}, .* Send PNG, JPEG, WEBP or GIF") as caught:
        decoded_size(OTHER_FORMATS[name], PIXELS)
    assert caught.value.code == "image_format"


def test_the_error_says_that_a_file_is_no_image() -> None:
    with pytest.raises(Invalid, match="is not an image"):
        decoded_size(b"hello", PIXELS)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF"])
def test_the_error_says_that_a_file_ends_too_early(form: str) -> None:
    file = picture(400, 300, form=form)
    with pytest.raises(Invalid, match="ends too early") as caught:
        decoded_size(file[: len(file) * 2 // 3], PIXELS)
    assert caught.value.code == "image_broken"


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("length", [12, 20, 40, 100])
def test_a_file_that_was_cut_in_its_header_is_broken_and_not_another_format(form: str, length: int) -> None:
    with pytest.raises(Invalid) as caught:
        decoded_size(picture(400, 300, form=form)[:length], PIXELS)
    assert caught.value.code == "image_broken"


def webp(width: int, height: int, **save: Any) -> bytes:
    """A WebP of 64 x 48 pixels whose header states another size."""
    file = bytearray(file_of("WEBP", **save))
    kind = bytes(file[12:16])
    if kind == b"VP8X":
        file[24:30] = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    elif kind == b"VP8L":
        file[21:25] = (int.from_bytes(file[21:25], "little") & ~0xFFFFFFF | (height - 1) << 14 | width - 1).to_bytes(
            4, "little"
        )
    else:
        file[26:30] = width.to_bytes(2, "little") + height.to_bytes(2, "little")
    return bytes(file)


KINDS_OF_WEBP: dict[str, dict[str, Any]] = {
    "VP8 ": {},
    "VP8L": {"lossless": True},
    "VP8X": {"save_all": True, "append_images": [Image.new("RGB", (64, 48), "blue")], "duration": 100},
}


@pytest.mark.parametrize("kind", KINDS_OF_WEBP)
def test_a_small_webp_with_a_large_canvas_is_refused_before_a_decoder_opens_it(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = webp(7680, 4320, **KINDS_OF_WEBP[kind])
    assert file[12:16] == kind.encode()
    assert len(file) < 400
    monkeypatch.setattr(Image, "open", None)
    with pytest.raises(Invalid, match="7680 x 4320") as caught:
        decoded_size(file, PIXELS)
    assert caught.value.code == "image_too_many_pixels"
    with pytest.raises(TooManyPixels):
        open_image(file, 64 * 48)


@pytest.mark.parametrize("kind", KINDS_OF_WEBP)
def test_a_webp_may_have_half_of_the_allowed_pixels(kind: str) -> None:
    file = file_of("WEBP", **KINDS_OF_WEBP[kind])
    assert decoded_size(file, 64 * 48 * 2) == (64, 48)
    with pytest.raises(Invalid, match="at most 3,071 are allowed"):
        decoded_size(file, 64 * 48 * 2 - 1)
