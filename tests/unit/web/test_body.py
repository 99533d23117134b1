"""What a body costs is bounded before it is parsed: values, nesting, parts, headers of parts, and bytes in flight."""

from __future__ import annotations

import json
import tracemalloc
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import BadRequest, Unavailable
from web.http.body import MAX_JSON_DEPTH, MAX_JSON_VALUES, MAX_PARTS, BodyBudget, check_json, parse_form

MANY = 2**20
FORM = "multipart/form-data; boundary=b"
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(), inner, max_size=5),
    max_leaves=50,
)


@pytest.mark.parametrize("value", ["{}", "[]", "1", "null", '""', '{"a":1}', '"a,b"', r'"\""', r'"\\"', "[[]]", " {} "])
def test_a_list_of_many_values_is_refused_with_little_memory(value: str) -> None:
    body = f"[{','.join([value] * MANY)}]".encode()
    tracemalloc.start()
    try:
        with pytest.raises(BadRequest, match="values"):
            check_json(body)
        assert tracemalloc.get_traced_memory()[1] < 10 * len(body) + 4 * MAX_JSON_VALUES * 64
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("opening", ["[", '{"a":', '[{"a":'])
def test_deep_nesting_is_refused(opening: str) -> None:
    with pytest.raises(BadRequest, match="nested"):
        check_json((opening * (MAX_JSON_DEPTH + 1)).encode())


@pytest.mark.parametrize("text", [",[{" * MANY, "\\" * MANY, '"' * MANY, '\\",[' * MANY])
def test_what_is_inside_a_text_does_not_count(text: str) -> None:
    check_json(json.dumps({"prompt": text}).encode())


@settings(max_examples=30)
@given(JSON, st.booleans())
def test_ordinary_json_is_accepted(value: Any, ascii_only: bool) -> None:
    check_json(json.dumps({"a": value}, ensure_ascii=ascii_only).encode(errors="replace"))


def part(head: bytes, content: bytes = b"x") -> bytes:
    return b"--b\r\n" + head + b"\r\n\r\n" + content + b"\r\n"


FIELD = b'Content-Disposition: form-data; name="request"'


@pytest.mark.parametrize(
    "body",
    [
        part(FIELD + b"\r\nX-Long: " + b"a" * 2**24) + b"--b--",
        part(FIELD + b"\r\nX: a" * 2**20) + b"--b--",
        b"--b\r\n" + FIELD + b"\n" * 2**24,
        b"--b\r\n" + b"\r" * 2**24,
        part(FIELD) * (MAX_PARTS + 1) + b"--b--",
        b"--b\r\n" * 2**20,
        b"",
        b"--b",
        part(FIELD),
    ],
    ids=["long", "many", "newlines", "returns", "parts", "delimiters", "empty", "cut", "open"],
)
def test_a_form_that_is_malformed_or_costly_is_refused(body: bytes) -> None:
    with pytest.raises(BadRequest):
        parse_form(body, FORM)


@pytest.mark.parametrize("content_type", ["multipart/form-data", "multipart/form-data; boundary=" + "b" * 71])
def test_a_form_needs_a_valid_boundary(content_type: str) -> None:
    with pytest.raises(BadRequest, match="boundary"):
        parse_form(part(FIELD) + b"--b--", content_type)


def test_a_budget_is_never_exceeded() -> None:
    budget = BodyBudget(10)
    budget.take(6)
    with pytest.raises(Unavailable):
        budget.take(5)
    budget.give_back(6)
    budget.take(10)
