"""Reading a body: what cannot be read is told cheaply, however large it is."""

from __future__ import annotations

import json

import pytest
from flask import Flask

from shared.errors import BadRequest
from web.body import read_body
from web.schemas import JobRequest


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
