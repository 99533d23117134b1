"""Days in requests for usage."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared.settings import Settings
from tests.support.fake_redis import FakeRedis
from web.access.api_keys import KeyStore
from web.app import create_app


@pytest.mark.parametrize(
    ("query", "status", "field"),
    [
        ("end=0001-01-01", 400, "end"),
        ("start=0001-01-01&end=1970-01-01", 400, "start"),
        ("end=1970-01-01", 200, None),
        ("start=9999-12-31&end=9999-12-31", 200, None),
        ("end=2026-02-30", 400, "end"),
        ("end=", 400, "end"),
    ],
)
def test_any_day_gets_an_answer(tmp_path: Path, query: str, status: int, field: str | None) -> None:
    settings = Settings(data_dir=tmp_path)
    client = create_app(settings, FakeRedis()).test_client()
    key = KeyStore(settings.keys_file).create("key", ["infer"])
    response = client.get(f"/v1/usage?{query}", headers={"X-API-Key": key})
    assert (response.status_code, response.get_json().get("error", {}).get("param")) == (status, field)
