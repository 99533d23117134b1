"""Reading a body: what cannot be read is told cheaply, however large it is."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from flask import Flask

from shared.errors import BadRequest, Invalid
from web.http.request import read_body, uploads
from web.schemas.requests import JobRequest


def refusal(body: bytes) -> BadRequest:
    request = Flask("test").test_request_context("/", method="POST", data=body, content_type="application/json")
    with request, pytest.raises(BadRequest) as caught:
        read_body(JobRequest)
    return caught.value


def test_an_object_of_very_many_names_is_not_looked_at_name_by_name() -> None:
    names = ",".join(f'"a{i}":0' for i in range(100_000))
    assert refusal(f"{{{names},{names}}}".encode()).code == "invalid_json"
    assert refusal(json.dumps({"prompt": "a", "metadata": {f"a{i}": 0 for i in range(1001)}}).encode())


def test_a_name_twice_is_told_even_if_it_is_no_text() -> None:
    field = refusal(b'{"\\ud800": 1, "\\ud800": 2}').field
    assert field == "?"


@contextmanager
def form(**fields: object) -> Iterator[None]:
    with Flask("test").test_request_context("/", method="POST", data=fields, content_type="multipart/form-data"):
        yield


def file(content: bytes, name: str = "a") -> tuple[io.BytesIO, str]:
    return io.BytesIO(content), name


ASKED = {"prompt": "née"}


@pytest.mark.parametrize(
    "request_", [json.dumps(ASKED, ensure_ascii=False), file(json.dumps(ASKED).encode(), "a.json")]
)
def test_the_request_of_a_form_is_a_field_or_a_file(request_: object) -> None:
    with form(request=request_, images=[file(b"1"), file(b"2", "")]):
        assert read_body(JobRequest).prompt == "née"
        assert uploads() == [b"1", b"2"]


def test_a_form_has_one_request() -> None:
    for fields in ({}, {"request": ["{}", "{}"]}, {"request": ["{}", file(b"{}")]}):
        with form(images=file(b"1"), **fields), pytest.raises(Invalid) as caught:
            read_body(JobRequest)
        assert caught.value.field == "request"


@pytest.mark.parametrize("text", [b'{"prompt": "caf\xe9"}', '{"prompt": "\ufffd"}'.encode()])
def test_a_field_that_is_no_text_is_told_and_not_mended(text: bytes) -> None:
    body = b'--B\r\nContent-Disposition: form-data; name="request"\r\n\r\n' + text + b"\r\n--B--\r\n"
    kind = "multipart/form-data; boundary=B"
    with Flask("test").test_request_context("/", method="POST", data=body, content_type=kind):
        with pytest.raises(BadRequest) as caught:
            read_body(JobRequest)
        assert (caught.value.code, caught.value.field) == ("invalid_utf8", "request")
    with form(request=(io.BytesIO('{"prompt": "\ufffd"}'.encode()), "request.json")):
        assert read_body(JobRequest).prompt == "\ufffd"


def test_a_file_that_is_no_text_is_told() -> None:
    with form(request=file(b'{"prompt": "\xff"}')), pytest.raises(BadRequest) as caught:
        read_body(JobRequest)
    assert caught.value.code == "invalid_utf8"
