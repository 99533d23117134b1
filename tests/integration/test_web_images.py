"""Images of requests over HTTP: uploads, storage, and what must not appear in logs."""

from __future__ import annotations

import io
import json
import socket
import struct
from collections.abc import Iterator

import pytest
from PIL import Image, PngImagePlugin

from shared.jobs.images import UNACCEPTED_S, ImageStore, digest
from shared.redis import keys
from shared.redis.client import connect
from tests.plugins.web_stack import WebStack, running_web
from tests.support.image_files import data_url, picture
from tests.support.load import Load
from tests.support.valkey import DURABLE
from tests.support.waiting import eventually

SECRET = "private-metadata"
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
    info, file = PngImagePlugin.PngInfo(), io.BytesIO()
    info.add_text("Comment", SECRET)
    info.add_itxt("Description", SECRET)
    Image.new("RGB", (64, 48)).save(file, "PNG", pnginfo=info)
    return file.getvalue()


@pytest.mark.parametrize("image", [with_exif(), with_texts()], ids=["JPEG", "PNG"])
def test_metadata_of_an_image_is_in_no_log_record_or_response(web: WebStack, image: bytes) -> None:
    url = data_url(image)
    job = web.submit(images=[url])
    broken = web.http.post("/v1/jobs", json={"prompt": "hi", "images": [data_url(image[:-40])]})
    assert broken.status_code == 422
    with web.client() as client:
        record = client.hgetall("mlxq:job:" + job["id"])
    log = web.log.read_text()
    assert "POST /v1/jobs 202" in log
    for text in (log, str(record), broken.text):
        assert SECRET not in text
        assert url[60:120] not in text


def with_faulty_tags(count: int) -> bytes:
    """An image with EXIF tags that claim to be larger than the file."""
    tags = b"".join(struct.pack("<HHLL", 1000 + n, 7, 10**6, 8) for n in range(count))
    exif, file = b"II*\0" + struct.pack("<LH", 8, count) + tags + bytes(4), io.BytesIO()
    Image.new("RGB", (64, 48)).save(file, "PNG", exif=exif)
    return file.getvalue()


def test_faulty_metadata_of_an_image_is_not_logged(web: WebStack) -> None:
    before = len(web.log.read_text().splitlines())
    web.submit(images=[data_url(with_faulty_tags(1000))])
    lines = web.log.read_text().splitlines()[before:]
    assert len(lines) < 20
    assert all(json.loads(line) for line in lines)


def test_the_text_field_of_a_form_may_be_as_large_as_a_body(web: WebStack) -> None:
    body = {"messages": [{"role": "user", "content": "Go on. " * 200_000}], "max_tokens": 1}
    form, files = {"request": json.dumps(body)}, [("images", ("a.png", with_texts()))]
    assert web.http.post("/v1/jobs", data=form, files=files).status_code == 202
    response = web.http.post("/v1/jobs", data={"request": "x" * 17_000_000}, files=files)
    assert (response.status_code, response.json()["code"]) == (413, "body_too_large")


def form_chunks(size: int) -> Iterator[bytes]:
    """A form that is sent in chunks, without Content-Length."""
    yield b'--B\r\nContent-Disposition: form-data; name="request"\r\n\r\n{"prompt": "hi"}\r\n'
    yield b'--B\r\nContent-Disposition: form-data; name="images"; filename="a"\r\n\r\n' + with_texts()
    yield from [bytes(500_000)] * (size // 500_000)
    yield b"\r\n--B--\r\n"


@pytest.mark.parametrize(("size", "status", "code"), [(0, 202, None), (17_000_000, 413, "body_too_large")])
def test_a_form_may_be_sent_without_a_length(web: WebStack, size: int, status: int, code: str | None) -> None:
    form = {"Content-Type": "multipart/form-data; boundary=B"}
    response = web.http.post("/v1/jobs", content=form_chunks(size), headers=form)
    assert (response.status_code, response.json().get("code")) == (status, code)


@pytest.mark.slow
def test_accepted_jobs_have_their_images_after_redis_was_killed() -> None:
    def image(key: str) -> bytes:
        return picture(64, 48, seed=int(key.replace("-", "")))

    with running_web({**DURABLE, "appendfsync": "everysec"}) as web:
        load = Load(web.url, web.key, lambda key: {"prompt": key, "images": [data_url(image(key))]})
        with load.running(threads=4, each=30):
            for share in (0.25, 0.5, 0.75):
                eventually(lambda s=share: len(load.accepted) >= 120 * s, within_s=60)
                web.kill_redis()
                web.start_redis()
        assert len(load.accepted) == 120
        with connect(web.redis_url, decode_responses=False) as files:
            store = ImageStore(files)
            for key, job_id in load.accepted.items():
                assert store.get(job_id, [digest(image(key))]) == {digest(image(key)): image(key)}
            stored = {
                name.decode().removeprefix(keys.IMAGES) for name in files.scan_iter(keys.IMAGES + "*", count=1000)
            }
            assert all(
                0 < files.ttl(keys.IMAGES + job_id) <= UNACCEPTED_S for job_id in stored - {*load.accepted.values()}
            )


def test_urls_do_not_reach_internal_addresses() -> None:
    hosts = ["127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]", "0.0.0.0", "2130706433", "169.254.169.254"]
    with socket.create_server(("127.0.0.1", 0)) as internal, running_web(IMAGE_URLS="true") as web:
        internal.setblocking(False)
        for url in [f"http://{host}{port}/a.png" for host in hosts for port in ("", f":{internal.getsockname()[1]}")]:
            response = web.http.post("/v1/jobs", json={"prompt": "hi", "images": [url]})
            assert (response.status_code, response.json()["field"]) == (422, "images[0]"), url
            assert response.json()["code"] in ("image_url_refused", "image_unreachable"), url
        with pytest.raises(BlockingIOError):
            internal.accept()
        with web.client() as client:
            assert not [*client.scan_iter(keys.JOB + "*"), *client.scan_iter(keys.IMAGES + "*")]
