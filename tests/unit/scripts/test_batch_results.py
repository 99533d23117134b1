"""What `scripts/batch` writes about jobs whose answers are parsed."""

from __future__ import annotations

import json
from typing import Any

import pytest

from scripts.client.api import RemoteJob
from scripts.client.prompts import Prompt
from scripts.client.results import Result
from scripts.client.runner import _job_result

MESSAGE = {"role": "assistant", "content": "4", "reasoning_content": "2 + 2", "tool_calls": None}


@pytest.mark.parametrize(
    "parsed",
    [
        {},
        {"actions": [{"action": "wait"}], "parse_error": None},
        {"regions": [], "parse_error": "why"},
        {"message": MESSAGE},
    ],
)
def test_a_line_has_the_parsed_fields_that_the_request_asked_for(parsed: dict[str, Any]) -> None:
    job = RemoteJob.from_json({"id": "job_1", "status": "succeeded", "output": {"text": "x"}, **parsed})
    line = _job_result(Prompt(line=1, body={"prompt": "hi"}, custom_id=None, digest="a" * 32), job).to_line()
    written = json.loads(line)
    assert {
        name: written[name] for name in ("actions", "regions", "parse_error", "message") if name in written
    } == parsed
    assert Result.from_line(line).text == "x"
