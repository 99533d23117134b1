"""Pages of configured origins may call the API; preflight requests need no key."""

from __future__ import annotations

from pathlib import Path

import pytest
from flask.testing import FlaskClient

from shared.settings import Settings
from tests.support.fake_redis import FakeRedis
from web.app import create_app

PAGE = "https://chat.example.com"
PREFLIGHT = {
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os",
}


def client(folder: Path, origins: str) -> FlaskClient:
    return create_app(Settings(data_dir=folder, cors_origins=origins), FakeRedis()).test_client()


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/jobs", "/inference"])
@pytest.mark.parametrize(("origins", "allowed"), [("*", "*"), (f"https://a.example, {PAGE}/", PAGE)])
def test_a_preflight_request_needs_no_key(tmp_path: Path, path: str, origins: str, allowed: str) -> None:
    response = client(tmp_path, origins).options(path, headers={"Origin": PAGE, **PREFLIGHT})
    assert (response.status_code, response.headers["Access-Control-Allow-Origin"]) == (204, allowed)
    assert "POST" in response.headers["Access-Control-Allow-Methods"]
    assert response.headers["Access-Control-Allow-Headers"] == PREFLIGHT["Access-Control-Request-Headers"]
    assert "Access-Control-Allow-Credentials" not in response.headers


def test_errors_can_be_read_by_the_page(tmp_path: Path) -> None:
    response = client(tmp_path, PAGE).post("/v1/chat/completions", headers={"Origin": PAGE}, json={})
    assert (response.status_code, response.headers["Access-Control-Allow-Origin"]) == (401, PAGE)
    assert "X-Request-ID" in response.headers["Access-Control-Expose-Headers"]
    assert "Origin" in response.headers["Vary"]


@pytest.mark.parametrize("origin", ["https://evil.example", f"{PAGE}.evil.example", "null", ""])
def test_other_pages_are_not_allowed(tmp_path: Path, origin: str) -> None:
    web = client(tmp_path, PAGE)
    for response in (
        web.options("/v1/jobs", headers={"Origin": origin, **PREFLIGHT}),
        web.get("/livez", headers={"Origin": origin}),
    ):
        assert "Access-Control-Allow-Origin" not in response.headers
        assert "Origin" in response.headers["Vary"], "a cache must not serve this response to an allowed page"


def test_it_is_off_by_default(tmp_path: Path) -> None:
    web = client(tmp_path, "")
    refused = web.options("/v1/jobs", headers={"Origin": PAGE, **PREFLIGHT})
    assert refused.status_code == 401
    assert not [name for name, _ in web.get("/livez", headers={"Origin": PAGE}).headers if name.startswith("Access-")]


def test_a_request_that_is_no_preflight_needs_a_key(tmp_path: Path) -> None:
    assert client(tmp_path, "*").options("/v1/jobs", headers={"Origin": PAGE}).status_code == 401
