"""`/v1/files` with the official client, over real sockets."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.plugins.web_stack import WebStack, running_web
from tests.support.waiting import eventually

LINE = b'{"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": {}}\n'


@pytest.fixture(scope="module")
def web() -> Iterator[WebStack]:
    with running_web(MAX_FILE_BYTES=str(2**20), FILES_BYTES_PER_KEY=str(3 * 2**20 - 1)) as stack:
        yield stack


@pytest.fixture
def sdk(web: WebStack) -> Iterator[openai.OpenAI]:
    """A client with a key of its own."""
    name = f"test-{os.urandom(4).hex()}"
    key = web.keys.create(name, {"infer"})
    with openai.OpenAI(base_url=f"{web.url}/v1", api_key=key, max_retries=0) as client:
        eventually(lambda: client.files.list().data == [], "the API knows the new key")
        yield client


def code(error: openai.APIStatusError) -> object:
    return error.code


def test_a_file_can_be_uploaded_read_listed_and_deleted(sdk: openai.OpenAI) -> None:
    content = LINE * 5000
    file = sdk.files.create(file=("requests.jsonl", content), purpose="batch")
    assert (file.filename, file.bytes, file.purpose, file.object) == ("requests.jsonl", len(content), "batch", "file")
    assert file.expires_at is not None and file.expires_at - file.created_at == 30 * 24 * 3600
    assert sdk.files.retrieve(file.id) == file
    assert sdk.files.content(file.id).read() == content
    assert [each.id for each in sdk.files.list()] == [file.id]
    assert sdk.files.delete(file.id).deleted
    assert [*sdk.files.list()] == []
    with pytest.raises(openai.NotFoundError) as refused:
        sdk.files.content(file.id)
    assert refused.value.code == "file_not_found"


def test_content_is_kept_byte_by_byte(sdk: openai.OpenAI) -> None:
    content = os.urandom(300_000) + b"\r\n--\r\n-\r" + os.urandom(1000)
    file = sdk.files.create(file=("noise", content), purpose="batch")
    assert sdk.files.content(file.id).read() == content


def test_a_lifetime_can_be_shortened(sdk: openai.OpenAI) -> None:
    file = sdk.files.create(file=("a", LINE), purpose="batch", expires_after={"anchor": "created_at", "seconds": 3600})
    assert file.expires_at == file.created_at + 3600


def test_the_client_pages_through_a_list(sdk: openai.OpenAI) -> None:
    ids = [sdk.files.create(file=(f"{n}.jsonl", LINE), purpose="batch").id for n in range(5)]
    assert [file.id for file in sdk.files.list(limit=2, order="asc")] == ids
    assert [file.id for file in sdk.files.list(limit=2)] == ids[::-1]
    assert [*sdk.files.list(purpose="batch_output")] == []


def test_files_of_another_key_do_not_exist(web: WebStack, sdk: openai.OpenAI) -> None:
    file = sdk.files.create(file=("a", LINE), purpose="batch")
    other = sdk.with_options(api_key=web.key)
    for call in (other.files.retrieve, other.files.content, other.files.delete):
        with pytest.raises(openai.NotFoundError):
            call(file.id)
    assert [*other.files.list()] == []


@pytest.mark.parametrize("file_id", ["file-x", "..%2f..%2fkeys", "file-" + "0" * 28, "file-" + "é" * 28])
def test_an_unknown_id_is_refused(web: WebStack, file_id: str) -> None:
    response = web.http.get(f"/v1/files/{file_id}")
    assert response.status_code == 404


def test_a_file_that_is_too_large_is_refused_and_leaves_nothing(web: WebStack, sdk: openai.OpenAI) -> None:
    with pytest.raises(openai.APIStatusError) as refused:
        sdk.files.create(file=("a", bytes(2**20 + 1)), purpose="batch")
    assert (refused.value.status_code, refused.value.param) == (413, "file")
    assert leftovers(web.home) == []


def test_the_files_of_a_key_have_a_quota(web: WebStack, sdk: openai.OpenAI) -> None:
    for _ in range(2):
        sdk.files.create(file=("a", bytes(2**20)), purpose="batch")
    with pytest.raises(openai.APIStatusError) as refused:
        sdk.files.create(file=("a", bytes(2**20)), purpose="batch")
    assert (refused.value.status_code, refused.value.code) == (413, "files_quota_exceeded")
    assert leftovers(web.home) == []


@pytest.mark.parametrize(
    ("fields", "files", "param"),
    [
        ({"purpose": "fine-tune"}, {"file": ("a", LINE)}, "purpose"),
        ({}, {"file": ("a", LINE)}, "purpose"),
        ({"purpose": "batch"}, {"other": ("a", LINE)}, "other"),
        ({"purpose": "batch", "color": "red"}, {"file": ("a", LINE)}, "color"),
        ({"purpose": "batch", "expires_after[seconds]": "1"}, {"file": ("a", LINE)}, "expires_after[seconds]"),
        ({"purpose": "batch", "expires_after[anchor]": "now"}, {"file": ("a", LINE)}, "expires_after[anchor]"),
        ({"purpose": "x" * 10_000}, {"file": ("a", LINE)}, "purpose"),
    ],
)
def test_a_wrong_form_is_refused_by_name(
    web: WebStack, fields: dict[str, str], files: dict[str, tuple[str, bytes]], param: str
) -> None:
    response = web.http.post("/v1/files", data=fields, files=files)
    assert response.status_code in (400, 422)
    assert response.json()["error"]["param"] == param
    assert leftovers(web.home) == []


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"--b",
        b"--b\r\n\r\n",
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nno end',
        b"--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n--b--\r\n",
        b"--b\r\nX: " + b"x" * 500_000,
        b"x" * 500_000,
    ],
    ids=range(7),
)
def test_a_malformed_form_is_refused(web: WebStack, body: bytes) -> None:
    response = web.http.post("/v1/files", content=body, headers={"Content-Type": "multipart/form-data; boundary=b"})
    assert response.status_code in (400, 422), response.text
    assert leftovers(web.home) == []


def test_json_is_not_a_form(web: WebStack) -> None:
    assert web.http.post("/v1/files", json={"purpose": "batch"}).status_code == 415


def test_an_upload_that_breaks_off_leaves_nothing(web: WebStack) -> None:
    head = (
        f"POST /v1/files HTTP/1.1\r\nHost: x\r\nX-API-Key: {web.key}\r\nContent-Length: 900000\r\n"
        "Content-Type: multipart/form-data; boundary=b\r\n\r\n"
        '--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    )
    with socket.create_connection(("127.0.0.1", int(web.url.rsplit(":", 1)[1]))) as client:
        client.sendall(head.encode() + bytes(100_000))
        eventually(lambda: leftovers(web.home), "the upload has begun")
    eventually(lambda: not leftovers(web.home), "the upload is discarded")


def leftovers(home: Path) -> list[Path]:
    return [*home.glob("files/*/*.part")]
