"""The document: complete, valid, and made of what validates."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from openapi_pydantic import parse_obj

from shared.settings import ROOT, Settings
from tests.support.fake_redis import FakeRedis
from web.access.api_keys import KeyStore
from web.app import create_app
from web.schemas.requests import JobRequest


@pytest.fixture
def app(tmp_path: Path) -> Flask:
    return create_app(Settings(data_dir=tmp_path), FakeRedis())


@pytest.fixture
def document(app: Flask) -> dict[str, Any]:
    answer = app.test_client().get("/openapi.json")
    assert answer.content_type == "application/json"
    assert answer.json is not None
    return dict(answer.json)


def operations(document: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {
        (method.upper(), path): operation
        for path, item in document["paths"].items()
        for method, operation in item.items()
    }


def test_it_is_openapi_3_1(document: dict[str, Any]) -> None:
    assert document["openapi"] == "3.1.0"
    parse_obj(document)


def test_every_route_is_in_it(app: Flask, document: dict[str, Any]) -> None:
    routes = {
        (method, re.sub(r"<(\w+)>", r"{\1}", rule.rule))
        for rule in app.url_map.iter_rules()
        for method in rule.methods or ()
        if method not in ("HEAD", "OPTIONS")
    }
    assert set(operations(document)) == routes


def test_every_route_with_a_key_is_described_as_refusing_parameters_that_it_does_not_know(
    document: dict[str, Any],
) -> None:
    secured = {at: each["responses"] for at, each in operations(document).items() if each.get("security")}
    assert ("GET", "/inference/models") in secured
    assert [at for at, responses in secured.items() if "422" not in responses] == []
    assert "410" in secured["POST", "/inference"], "of a stream that is asked for again too late"


def test_a_model_that_is_not_there_is_described_as_it_is_told(app: Flask, document: dict[str, Any]) -> None:
    (media_type,) = document["paths"]["/v1/models/{model_id}"]["get"]["responses"]["404"]["content"]
    key = KeyStore(app.extensions["mlxq"].settings.keys_file).create("caller", ["infer"])
    answer = app.test_client().get("/v1/models/nobody", headers={"X-API-Key": key})
    assert (answer.status_code, answer.content_type) == (404, media_type)


def test_every_reference_leads_somewhere(document: dict[str, Any]) -> None:
    schemas = set(document["components"]["schemas"])
    used = set(re.findall(r"#/components/schemas/(\w+)", json.dumps(document)))
    assert used == schemas


def test_names_of_operations_are_unique(document: dict[str, Any]) -> None:
    names = [operation["operationId"] for operation in operations(document).values()]
    assert len(names) == len(set(names))


def test_fields_are_those_that_validate(document: dict[str, Any]) -> None:
    schema = document["components"]["schemas"]["JobRequest"]
    assert set(schema["properties"]) == set(JobRequest.model_fields)
    assert schema["additionalProperties"] is False


def test_streams_errors_and_keys_are_told(document: dict[str, Any]) -> None:
    every = operations(document)
    stream = every["GET", "/v1/jobs/{job_id}/stream"]["responses"]["200"]["content"]
    assert set(stream) == {"text/event-stream", "application/x-ndjson"}
    assert set(every["POST", "/inference"]["responses"]["200"]["content"]) == {"application/json", *stream}
    assert "application/problem+json" in every["POST", "/v1/jobs"]["responses"]["422"]["content"]
    assert every["POST", "/v1/jobs"]["security"] == [{"ApiKey": []}, {"Bearer": []}]
    assert "security" not in every["GET", "/health"]
    assert set(document["components"]["securitySchemes"]) == {"ApiKey", "Bearer"}


def test_the_page_brings_its_own_assets(app: Flask) -> None:
    client = app.test_client()
    page = client.get("/docs").text
    for address in re.findall(r'(?:src|href)="([^"]+)"', page):
        assert address.startswith("/docs/")
        with client.get(address) as asset:
            assert asset.status_code == 200
    assert client.get("/docs/nothing.js").status_code == 404
    assert client.get("/docs/..%2f__init__.py").status_code == 404


def test_every_code_that_an_error_may_have_is_told(document: dict[str, Any]) -> None:
    sources = [path.read_text() for folder in ("web", "shared") for path in (ROOT / folder).rglob("*.py")]
    codes = {code for source in sources for code in re.findall(r'\bcode ?= ?"(\w+)"', source)}
    codes |= {code for source in sources for code in re.findall(r'code, title = \d+, "(\w+)"', source)}
    told = json.dumps([operation["responses"] for operation in operations(document).values()])
    assert {code for code in codes if f"`{code}`" not in told} == {"method_not_allowed"}  # of no route
