"""The OpenAPI document is valid, complete and consistent with the routes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from openapi_pydantic import parse_obj
from pydantic import BaseModel

from shared.settings import ROOT, Settings
from tests.support.fake_redis import FakeRedis
from web.access.api_keys import KeyStore
from web.anthropic.schemas import CountRequest, MessagesRequest
from web.app import create_app
from web.http.openai_errors import is_expected
from web.openai.requests import ChatRequest, CompletionRequest
from web.responses.requests import ResponseRequest, TokensRequest
from web.schemas.batches import BatchRequest
from web.schemas.inputs import EmbeddingRequest, RerankRequest
from web.schemas.keys import KeyLimits, KeyRequest
from web.schemas.models import AliasesRequest, DownloadRequest, LoadRequest, UnloadRequest
from web.schemas.requests import InferenceRequest, JobRequest
from web.schemas.webhooks import EndpointRequest, RotationRequest

REQUESTS: tuple[type[BaseModel], ...] = (
    *(JobRequest, InferenceRequest, ChatRequest, CompletionRequest, MessagesRequest, CountRequest),
    *(BatchRequest, EndpointRequest, RotationRequest, LoadRequest, UnloadRequest, ResponseRequest, TokensRequest),
    *(DownloadRequest, AliasesRequest),
    *(KeyRequest, KeyLimits, EmbeddingRequest, RerankRequest),
)


@pytest.fixture
def app(tmp_path: Path) -> Flask:
    return create_app(Settings(data_dir=tmp_path), FakeRedis())


@pytest.fixture
def document(app: Flask) -> dict[str, Any]:
    response = app.test_client().get("/openapi.json")
    assert response.content_type == "application/json"
    assert response.json is not None
    return dict(response.json)


def operations(document: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {
        (method.upper(), path): operation
        for path, item in document["paths"].items()
        for method, operation in item.items()
    }


def test_the_document_is_valid_openapi_3_1(document: dict[str, Any]) -> None:
    assert document["openapi"] == "3.1.0"
    parse_obj(document)


def test_every_route_is_documented(app: Flask, document: dict[str, Any]) -> None:
    routes = {
        (method, re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule))
        for rule in app.url_map.iter_rules()
        for method in rule.methods or ()
        if method not in ("HEAD", "OPTIONS")
        and not rule.rule.startswith("/docs")
        and not rule.endpoint.startswith("console.")
    }
    assert set(operations(document)) == routes


def test_every_example_of_a_request_is_valid(document: dict[str, Any]) -> None:
    kinds: dict[str, type[BaseModel]] = {kind.__name__: kind for kind in REQUESTS}
    checked = set()
    for operation in operations(document).values():
        for media_type, content in operation.get("requestBody", {}).get("content", {}).items():
            if media_type == "application/json":
                name = content["schema"]["$ref"].rpartition("/")[2]
                example = content["example"]
            elif "request" in content["schema"]["required"]:
                example = content["example"]["request"]
            else:
                continue  # an upload
            kinds[name].model_validate(example)
            checked.add(name)
    assert checked == set(kinds)


@pytest.mark.parametrize("kind", ["JobView", "InferenceView"])
def test_parsed_fields_may_be_absent(document: dict[str, Any], kind: str) -> None:
    schema = document["components"]["schemas"][kind]
    assert {"actions", "parse_error"} <= set(schema["properties"]) - set(schema["required"])
    assert {"id", "model", "usage"} <= set(schema["required"])


def test_every_route_with_a_key_documents_422_for_unknown_parameters(
    document: dict[str, Any],
) -> None:
    secured = {route: each["responses"] for route, each in operations(document).items() if each.get("security")}
    assert ("GET", "/inference/models") in secured
    anthropic = [("POST", "/v1/messages"), ("POST", "/v1/messages/count_tokens")]
    compatible = [*anthropic, *(route for route in secured if is_expected(route[1]))]
    assert {route for route, responses in secured.items() if "422" not in responses} == {*compatible}
    assert all("400" in secured[route] for route in compatible)
    assert all("529" in secured[route] for route in anthropic)
    assert "410" in secured["POST", "/inference"], "a repeated request can come after its events have expired"


def test_the_documented_media_type_of_a_missing_model_is_correct(app: Flask, document: dict[str, Any]) -> None:
    (media_type,) = document["paths"]["/v1/models/{model_id}"]["get"]["responses"]["404"]["content"]
    key = KeyStore(app.extensions["mlxq"].settings.keys_file).create("caller", ["infer"])
    response = app.test_client().get("/v1/models/nobody", headers={"X-API-Key": key})
    assert (response.status_code, response.content_type) == (404, media_type)


def test_schemas_and_references_match(document: dict[str, Any]) -> None:
    schemas = set(document["components"]["schemas"])
    used = set(re.findall(r"#/components/schemas/(\w+)", json.dumps(document)))
    assert used == schemas


def test_operation_ids_are_unique(document: dict[str, Any]) -> None:
    names = [operation["operationId"] for operation in operations(document).values()]
    assert len(names) == len(set(names))


def test_documented_fields_are_the_validated_ones(document: dict[str, Any]) -> None:
    schema = document["components"]["schemas"]["JobRequest"]
    assert set(schema["properties"]) == set(JobRequest.model_fields)
    assert schema["additionalProperties"] is False


def test_streams_errors_and_authentication_are_documented(document: dict[str, Any]) -> None:
    by_route = operations(document)
    stream = by_route["GET", "/v1/jobs/{job_id}/stream"]["responses"]["200"]["content"]
    assert set(stream) == {"text/event-stream", "application/x-ndjson"}
    assert set(by_route["POST", "/inference"]["responses"]["200"]["content"]) == {"application/json", *stream}
    assert "application/problem+json" in by_route["POST", "/v1/jobs"]["responses"]["422"]["content"]
    assert by_route["POST", "/v1/jobs"]["security"] == [{"ApiKey": []}, {"Bearer": []}]
    assert "security" not in by_route["GET", "/health"]
    assert set(document["components"]["securitySchemes"]) == {"ApiKey", "Bearer"}


def test_the_page_loads_all_its_assets_from_this_server(app: Flask) -> None:
    client = app.test_client()
    page = client.get("/docs").text
    for address in re.findall(r'(?:src|href)="([^"]+)"', page):
        assert address.startswith("/docs/")
        with client.get(address) as asset:
            assert asset.status_code == 200
    assert client.get("/docs/nothing.js").status_code == 404
    assert client.get("/docs/..%2f__init__.py").status_code == 404


def test_all_error_codes_are_documented(document: dict[str, Any]) -> None:
    sources = [path.read_text() for folder in ("web", "shared") for path in (ROOT / folder).rglob("*.py")]
    codes = {code for source in sources for code in re.findall(r'\bcode ?= ?"(\w+)"', source)}
    codes |= {code for source in sources for code in re.findall(r'code, title = \d+, "(\w+)"', source)}
    documented = json.dumps([operation["responses"] for operation in operations(document).values()])
    assert {code for code in codes if f"`{code}`" not in documented} == {
        "method_not_allowed"
    }  # not an error of a route
