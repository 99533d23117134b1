"""Every field of files, batches and webhook events that OpenAI's client knows is supported, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from openai.types import Batch, FileObject, batch_create_params, batch_list_params, file_create_params, file_list_params
from openai.types.webhooks import UnwrapWebhookEvent
from pydantic import ValidationError

from shared.settings import Settings
from tests.support.fake_redis import FakeRedis
from web.app import create_app
from web.schemas.batches import BatchRequest, BatchView, ExpiresAfter
from web.schemas.files import FileView
from web.schemas.webhooks import WebhookEvent

BATCH: dict[str, Any] = {"input_file_id": "file-1", "endpoint": "/v1/chat/completions", "completion_window": "24h"}
REFUSED_ENDPOINTS = {"/v1/moderations", "/v1/images/generations", "/v1/images/edits", "/v1/videos"}
DEPRECATED = {"status_details"}


@pytest.fixture
def paths(tmp_path: Path) -> dict[str, Any]:
    """The routes of the OpenAPI document."""
    response = create_app(Settings(data_dir=tmp_path), FakeRedis()).test_client().get("/openapi.json")
    assert response.json is not None
    found: dict[str, Any] = response.json["paths"]
    return found


def parameters(operation: dict[str, Any]) -> set[str]:
    return {each["name"] for each in operation["parameters"] if each["in"] == "query"}


def test_the_fields_of_requests(paths: dict[str, Any]) -> None:
    assert get_type_hints(batch_create_params.BatchCreateParams).keys() == BatchRequest.model_fields.keys()
    assert get_type_hints(batch_create_params.OutputExpiresAfter).keys() == ExpiresAfter.model_fields.keys()
    form = paths["/v1/files"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]["properties"]
    names = get_type_hints(file_create_params.FileCreateParams).keys()
    assert {name.partition("[")[0] for name in form} == names
    expires = get_type_hints(file_create_params.ExpiresAfter).keys()
    assert {name for name in form if "[" in name} == {f"expires_after[{name}]" for name in expires}
    listed = {"/v1/files": file_list_params.FileListParams, "/v1/batches": batch_list_params.BatchListParams}
    for path, known in listed.items():
        assert parameters(paths[path]["get"]) == get_type_hints(known).keys(), path


def test_the_fields_of_answers() -> None:
    assert Batch.model_fields.keys() == BatchView.model_fields.keys()
    assert FileObject.model_fields.keys() - DEPRECATED == FileView.model_fields.keys()


def test_endpoints_are_supported_or_refused_by_name() -> None:
    known = set(get_args(get_type_hints(batch_create_params.BatchCreateParams)["endpoint"]))
    supported = set(get_args(BatchRequest.model_fields["endpoint"].annotation))
    assert supported - {"/v1/rerank"} < known  # OpenAI's API has no rankings
    assert known - supported >= REFUSED_ENDPOINTS
    for endpoint in known - supported:
        with pytest.raises(ValidationError) as refused:
            BatchRequest.model_validate({**BATCH, "endpoint": endpoint})
        assert [error["loc"] for error in refused.value.errors()] == [("endpoint",)]


def test_events_of_batches_and_responses_are_those_of_the_client() -> None:
    known = {get_args(each.model_fields["type"].annotation)[0] for each in get_args(get_args(UnwrapWebhookEvent)[0])}
    sent = set(get_args(WebhookEvent))
    for kind in ("batch.", "response."):
        assert {name for name in sent if name.startswith(kind)} == {name for name in known if name.startswith(kind)}
