"""Requests with fields that the model or one of its workers would ignore are refused by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from shared.errors import Invalid, MlxqError, Unavailable
from shared.jobs.request import EMBED, RERANK, Constraint, Request, Sampling
from shared.models.registry import ModelCard, WorkerInfo
from web.admission.capabilities import check_capabilities
from web.cluster.snapshot import ClusterSnapshot

TOOL = {"type": "function", "function": {"name": "add"}}
ABLE = ModelCard("m", "text", 64, reasoning=True, tool_format="json_tools", structured=True)
UNABLE = ModelCard("m", "text", 64, reasoning=False)
OLD = ModelCard("m", "text", 64)
WORKER = WorkerInfo("w", "w@h", "h", 1, "m", "ready", 8, 0, 0.0, 0.0, {}, {}, protocol=1)

NEEDY: list[tuple[str, dict[str, Any]]] = [
    ("tools", {"tools": (TOOL,), "parse": "message"}),
    ("tools", {"tools": (TOOL,), "tool_choice": "required"}),
    ("tools", {"tools": (TOOL,), "tool_choice": "function:add"}),
    ("response_format", {"constraint": Constraint("json_object")}),
    ("thinking_budget", {"thinking_budget": 0}),
]
NEWER: list[tuple[str, dict[str, Any]]] = [
    *NEEDY,
    ("tools", {"tools": (TOOL,)}),
    ("logit_bias", {"logit_bias": ((1, 2.0),)}),
    ("chat_template_kwargs", {"template_variables": {"enable_thinking": False}}),
    ("continue_final_message", {"continue_final": True}),
]


def request(**fields: Any) -> Request:
    return Request("m", 8, Sampling(0.0), prompt="hi", **fields)


def refusal(asked: Request, card: ModelCard | None, *workers: WorkerInfo) -> MlxqError | None:
    try:
        check_capabilities(asked, card, ClusterSnapshot({}, workers, {}, taken_at=0.0))
    except MlxqError as error:
        return error
    return None


@pytest.mark.parametrize(("field", "fields"), NEEDY)
def test_a_field_that_the_model_cannot_honour_is_refused_by_name(field: str, fields: dict[str, Any]) -> None:
    error = refusal(request(**fields), UNABLE, WORKER)
    assert isinstance(error, Invalid)
    assert (error.code, error.field) == ("not_supported", field)
    assert field in error.detail
    assert refusal(request(**fields), ABLE, WORKER) is None


@pytest.mark.parametrize(
    "fields", [{}, {"tools": (TOOL,)}, {"tools": (TOOL,), "parse": "message", "tool_choice": "none"}]
)
def test_a_model_without_capabilities_serves_all_other_requests(fields: dict[str, Any]) -> None:
    assert refusal(request(**fields), UNABLE, WORKER) is None


@pytest.mark.parametrize(("field", "fields"), NEWER)
def test_a_field_that_an_older_worker_of_the_model_would_ignore_is_refused_for_now(
    field: str, fields: dict[str, Any]
) -> None:
    error = refusal(request(**fields), OLD, WORKER, replace(WORKER, protocol=0))
    assert isinstance(error, Unavailable)
    assert error.field == field
    assert error.retry_after
    assert refusal(request(**fields), OLD, WORKER, replace(WORKER, protocol=0, model="another")) is None


def test_adapters_need_newer_workers_than_tools() -> None:
    error = refusal(request(adapter="sql"), OLD, replace(WORKER, protocol=2), replace(WORKER, protocol=3))
    assert isinstance(error, Unavailable) and error.field == "adapter"
    assert refusal(request(adapter="sql"), OLD, replace(WORKER, protocol=3)) is None
    assert refusal(request(logit_bias=((1, 2.0),)), OLD, WORKER) is None


@pytest.mark.parametrize("kind", [EMBED, RERANK])
def test_inputs_need_newer_workers_than_tools(kind: str) -> None:
    asked = Request("m", 0, Sampling(0.0), kind=kind, inputs=("hi",))
    error = refusal(asked, OLD, WORKER, replace(WORKER, protocol=2))
    assert isinstance(error, Unavailable) and error.field == "model"
    assert refusal(asked, OLD, replace(WORKER, protocol=2)) is None


def test_older_workers_serve_requests_without_newer_fields() -> None:
    assert refusal(request(parse="message", logprobs=2), OLD, replace(WORKER, protocol=0)) is None


@pytest.mark.parametrize("card", [None, OLD])
def test_without_a_card_of_this_version_the_worker_checks(card: ModelCard | None) -> None:
    assert [refusal(request(**fields), card) for _, fields in NEEDY] == [None] * len(NEEDY)


def test_grammars_of_functions_need_a_format_with_text() -> None:
    tool = {"type": "function", "function": {"name": "patch", "grammar": 'start: "a"'}}
    asked = request(tools=(tool,), parse="message")
    assert refusal(asked, ABLE, WORKER) is None
    error = refusal(asked, replace(ABLE, tool_format="kimi_k2"), WORKER)
    assert isinstance(error, Invalid) and (error.code, error.field) == ("not_supported", "tools")
