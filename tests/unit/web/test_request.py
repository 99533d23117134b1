"""Reading request bodies: JSON, forms, and cheap refusal of malformed bodies."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import pytest
from flask import Flask

from shared.errors import BadRequest, Invalid
from web.http import body
from web.http.request import parse_json, read_body, uploads
from web.schemas.requests import JobRequest


def application() -> Flask:
    app = Flask("test")
    app.config["MAX_CONTENT_LENGTH"] = 32 * 2**20
    body.register(app, 64 * 2**20)
    return app


def refusal(content: bytes) -> BadRequest:
    request = application().test_request_context("/", method="POST", data=content, content_type="application/json")
    with request, pytest.raises(BadRequest) as caught:
        read_body(JobRequest)
    return caught.value


def test_an_object_with_too_many_names_is_refused() -> None:
    names = ",".join(f'"a{i}":0' for i in range(100_000))
    assert refusal(f"{{{names},{names}}}".encode()).code == "invalid_json"
    assert refusal(json.dumps({"prompt": "a", "metadata": {f"a{i}": 0 for i in range(1001)}}).encode())


def test_a_duplicate_name_is_refused_even_if_it_is_not_valid_unicode() -> None:
    field = refusal(b'{"\\ud800": 1, "\\ud800": 2}').field
    assert field == "?"


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [{"role": "user", "content": "\udfff"}]},
        {"messages": [], "tools": [{"function": {"parameters": {"\ud800": 1}}}]},
    ],
)
def test_text_that_no_encoding_has_is_refused(body: object) -> None:
    assert refusal(json.dumps(body).encode()).code == "invalid_json"


def test_escaped_pairs_and_escaped_backslashes_are_accepted() -> None:
    assert parse_json(rb'{"a": "\ud83d\ude00 \\ud800"}') == {"a": "😀 \\ud800"}


@contextmanager
def form(**fields: object) -> Iterator[None]:
    with patch("werkzeug.test.random", lambda: 0.5):  # otherwise, a boundary may have more than the 70 bytes allowed
        context = application().test_request_context(
            "/", method="POST", data=fields, content_type="multipart/form-data"
        )
    with context:
        yield


def file(content: bytes, name: str = "a") -> tuple[io.BytesIO, str]:
    return io.BytesIO(content), name


BODY = {"prompt": "née"}


@pytest.mark.parametrize("request_", [json.dumps(BODY, ensure_ascii=False), file(json.dumps(BODY).encode(), "a.json")])
def test_the_request_of_a_form_can_be_a_text_field_or_a_file(request_: object) -> None:
    with form(request=request_, images=[file(b"1"), file(b"2", "")]):
        assert read_body(JobRequest).prompt == "née"
        assert uploads() == [b"1", b"2"]


def test_a_form_needs_exactly_one_request() -> None:
    for fields in ({}, {"request": ["{}", "{}"]}, {"request": ["{}", file(b"{}")]}):
        with form(images=file(b"1"), **fields), pytest.raises(Invalid) as caught:
            read_body(JobRequest)
        assert caught.value.field == "request"


@pytest.mark.parametrize("text", [b'{"prompt": "caf\xe9"}', '{"prompt": "\ufffd"}'.encode()])
def test_a_text_field_that_is_not_utf8_is_refused(text: bytes) -> None:
    body = b'--B\r\nContent-Disposition: form-data; name="request"\r\n\r\n' + text + b"\r\n--B--\r\n"
    content_type = "multipart/form-data; boundary=B"
    with application().test_request_context("/", method="POST", data=body, content_type=content_type):
        with pytest.raises(BadRequest) as caught:
            read_body(JobRequest)
        assert (caught.value.code, caught.value.field) == ("invalid_utf8", "request")
    with form(request=(io.BytesIO('{"prompt": "\ufffd"}'.encode()), "request.json")):
        assert read_body(JobRequest).prompt == "\ufffd"


def test_a_file_that_is_not_utf8_is_refused() -> None:
    with form(request=file(b'{"prompt": "\xff"}')), pytest.raises(BadRequest) as caught:
        read_body(JobRequest)
    assert caught.value.code == "invalid_utf8"
