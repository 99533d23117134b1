"""Constrained answers in the whole stack: HTTP, queue, worker, engine, log and stream."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

pytest.importorskip("mlx_lm")

from scripts.client.api import Refused
from shared.jobs.log import EventKind
from shared.jobs.record import Status
from tests.plugins.stack import Stack, made_stack

NUMBER = {"type": "integer", "minimum": 0, "maximum": 999}
NUMBERS = {
    "type": "object",
    "properties": {"numbers": {"type": "array", "items": NUMBER, "minItems": 50, "maxItems": 55}},
    "required": ["numbers"],
    "additionalProperties": False,
}


def schema(value: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": value, "strict": True}}


def body(response_format: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"prompt": "Numbers, please.", "seed": 3, "max_tokens": 4000, "response_format": response_format, **more}


@pytest.fixture(scope="module")
def stack(tiny_model_path: Path) -> Iterator[Stack]:
    for stack in made_stack(tiny_model_path, {"LEASE_S": "1"}):
        stack.start_web()
        yield stack


@pytest.mark.parametrize(
    "sampling",
    [
        pytest.param({"temperature": 0}, id="greedy", marks=pytest.mark.long),
        pytest.param({"temperature": 0.9}, id="sampled"),
    ],
)
def test_a_constrained_answer_continues_after_its_worker_was_killed(stack: Stack, sampling: dict[str, Any]) -> None:
    request = body(schema(NUMBERS), **sampling)
    worker = stack.start_worker()
    with stack.client() as client:
        whole = client.submit(request, wait_s=60)
        while not whole.status.terminal:
            whole = client.job(whole.id, wait_s=60)
        jsonschema.validate(json.loads(whole.text), NUMBERS)

        job, texts, kinds = client.submit(request), [], []
        for event in client.events(job.id):
            kinds.append(event.kind)
            if event.kind is EventKind.CHUNK:
                texts.append(json.loads(event.data)["text"])
                if len(texts) == 3:
                    stack.stop(worker, signal.SIGKILL)
                    worker = stack.start_worker()
        finished = client.job(job.id)
    stack.stop(worker)
    assert EventKind.RESUMED in kinds
    assert finished.status is Status.SUCCEEDED
    assert "".join(texts) == finished.text == whole.text


@pytest.mark.parametrize(
    ("response_format", "field"),
    [
        (schema({"properties": {"a": {"uniqueItems": True}}}), "response_format.json_schema.schema"),
        (schema({"allOf": [{"$ref": "#"}]}), "response_format.json_schema.schema"),
        (schema({"enum": list(range(30_000))}), "response_format.json_schema.schema"),
        ({"type": "regex", "regex": "(?<=a)b"}, "response_format.regex"),
        ({"type": "grammar", "grammar": "start: missing"}, "response_format.grammar"),
    ],
    ids=["keyword", "recursion", "enum", "regex", "grammar"],
)
def test_a_constraint_that_cannot_be_honoured_creates_no_job(
    stack: Stack, response_format: dict[str, Any], field: str
) -> None:
    with stack.client() as client:
        before = client.request("GET", "/v1/jobs").json()["data"]
        with pytest.raises(Refused, match=re.escape(f"{field} cannot be honoured")) as refused:
            client.submit(body(response_format))
        assert (refused.value.status, refused.value.code) == (422, "constraint_error")
        assert client.request("GET", "/v1/jobs").json()["data"] == before
