"""Images of requests over sockets, without a model: what is taken, what is kept of it, and what is not told of it."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest
from PIL import Image, PngImagePlugin

from tests.plugins.web_stack import WebStack, running_web
from tests.support.pictures import data_url

SECRET = "nobodys-business"
DESCRIPTION, ARTIST, USER_COMMENT = 0x010E, 0x013B, 0x9286


@pytest.fixture(scope="module")
def web() -> Iterator[WebStack]:
    with running_web(LOG_LEVEL="DEBUG") as stack:
        yield stack


def with_exif() -> bytes:
    exif, file = Image.Exif(), io.BytesIO()
    exif[DESCRIPTION], exif[ARTIST], exif[USER_COMMENT] = SECRET, SECRET, b"ASCII\0\0\0" + SECRET.encode()
    Image.new("RGB", (64, 48)).save(file, "JPEG", exif=exif.tobytes(), comment=SECRET)
    return file.getvalue()


def with_texts() -> bytes:
    told, file = PngImagePlugin.PngInfo(), io.BytesIO()
    told.add_text("Comment", SECRET)
    told.add_itxt("Description", SECRET)
    Image.new("RGB", (64, 48)).save(file, "PNG", pnginfo=told)
    return file.getvalue()


@pytest.mark.parametrize("image", [with_exif(), with_texts()], ids=["JPEG", "PNG"])
def test_not_even_a_debug_log_has_what_an_image_says(web: WebStack, image: bytes) -> None:
    url = data_url(image)
    job = web.submit(images=[url])
    broken = web.http.post("/v1/jobs", json={"prompt": "hi", "images": [data_url(image[:-40])]})
    assert broken.status_code == 422
    with web.client() as client:
        record = client.hgetall("mlxq:job:" + job["id"])
    log = web.log.read_text()
    assert "POST /v1/jobs 202" in log
    for told in (log, str(record), broken.text):
        assert SECRET not in told
        assert url[60:120] not in told
