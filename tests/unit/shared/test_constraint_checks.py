"""Constraints are checked in a helper process, which a hostile one may end without any other effect."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from shared.errors import PromptRefused
from shared.jobs.request import Constraint, Request, Sampling
from shared.tokenizing import client
from shared.tokenizing.client import TokenizerBusy, Tokenizing

SLOW = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(9000)}, "required": []}
"""Takes half a second."""


def constrained(source: object, **fields: Any) -> Request:
    return Request("m", 1, Sampling(0.0), constraint=Constraint("json_schema", json.dumps(source)), **fields)


@pytest.fixture
def tokenizing() -> Iterator[Tokenizing]:
    with Tokenizing(20.0) as tokenizing:
        yield tokenizing


def refusal(tokenizing: Tokenizing, request: Request) -> tuple[str, str | None, str]:
    with pytest.raises(PromptRefused) as caught:
        tokenizing.check_constraints(request)
    return caught.value.code, caught.value.field, str(caught.value)


def test_the_field_and_the_place_are_named(tokenizing: Tokenizing) -> None:
    field = "response_format.json_schema.schema"
    code, named, text = refusal(tokenizing, constrained({"properties": {"a": {"not": {}}}}))
    assert (code, named) == ("constraint_error", field)
    assert text == f"{field} cannot be honoured: at properties.a: the keyword 'not' is not supported"
    tool = {"type": "function", "function": {"name": "f", "parameters": {"$ref": "#/none"}, "strict": True}}
    _, named, text = refusal(tokenizing, constrained({}, tools=({"function": {"name": "e"}}, tool)))
    assert named == "tools[1].function.parameters" and "does not exist" in text


def test_a_valid_constraint_is_checked_once(tokenizing: Tokenizing, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizing.check_constraints(constrained({"type": "string"}))
    tokenizing.check_constraints(Request("m", 1, Sampling(0.0)))
    with monkeypatch.context() as patch:
        patch.setattr(tokenizing, "_checks", None)
        tokenizing.check_constraints(constrained({"type": "string"}))


def test_a_slow_check_fails_only_its_request() -> None:
    with Tokenizing(0.05) as hasty:
        code, field, text = refusal(hasty, constrained(SLOW))
        assert (code, field) == ("constraint_error", "response_format.json_schema.schema")
        assert "more than 0.05 s" in text
    with Tokenizing(20.0) as patient:
        patient.check_constraints(constrained({"type": "integer"}))


def test_a_constraint_that_crashes_helpers_is_refused(tokenizing: Tokenizing, monkeypatch: pytest.MonkeyPatch) -> None:
    call, crashed = client._Helper.call, []

    def crash(helper: client._Helper, *args: Any) -> Any:
        crashed.append(helper._process.pid)
        helper._process.kill()
        return call(helper, *args)

    with monkeypatch.context() as patch:
        patch.setattr(client._Helper, "call", crash)
        text = refusal(tokenizing, constrained({"type": "string"}))[2]
    assert text == "response_format.json_schema.schema cannot be honoured: it is too complex"
    assert len(set(crashed)) == 2
    tokenizing.check_constraints(constrained({"type": "string"}))


def test_waiting_for_the_helper_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared.tokenizing.client._MAX_WAIT", 0.001)
    with Tokenizing(20.0) as tokenizing, tokenizing._checks._lock, pytest.raises(TokenizerBusy):
        tokenizing.check_constraints(constrained({}))
