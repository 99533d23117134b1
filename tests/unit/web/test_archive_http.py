"""Jobs in the archive through the API and the console: reading, listing, cancelling, running again and deleting."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from flask import Flask
from flask.testing import FlaskClient

from shared.errors import NotFound
from shared.jobs.record import Ending, Status
from shared.jobs.request import Request, Sampling
from shared.redis import keys
from shared.redis.client import Redis
from shared.settings import Settings
from tests.support.archive import archived
from tests.support.fake_redis import FakeRedis
from tests.support.queueing import lease, reserved, row, submit
from web.access.api_keys import KeyStore
from web.access.sessions import COOKIE
from web.app import create_app
from web.archive.database import Archive
from web.background import key_eraser
from web.background.key_eraser import KeyEraser
from web.services import Services

REQUEST = Request("m", 5, Sampling(0.0), prompt="what was asked").to_json()


class Site:
    """An API with an archived job, which Redis no longer has."""

    def __init__(self, app: Flask, redis: Redis) -> None:
        self.redis = redis
        self.services: Services = app.extensions["mlxq"]
        store = KeyStore(self.services.settings.keys_file)
        self.client = self._client(app, store.create("owner", ["infer"]))
        self.other = self._client(app, store.create("other", ["infer"]))
        self.admin = self._client(app, store.create("admin", ["admin"]))
        self.owner, _, self.admin_id = (key.id for key in store.list())
        assert self.services.archive is not None
        self.archive: Archive = self.services.archive
        self.job = archived(1, self.owner, request=REQUEST, metadata='{"team": "x"}')
        self.archive.write([self.job])
        self.services.archive_queue.open()
        self.id = self.job.record["id"]
        self.path = f"/v1/jobs/{self.id}"

    def console(self, path: str) -> tuple[int, str]:
        """A page that an admin sees."""
        client = self.admin.application.test_client()
        token = self.services.sessions.begin(self.admin_id).token
        client.set_cookie(COOKIE, token)
        page = client.get(path, headers={"Accept": "text/html"})
        return page.status_code, page.text

    def _client(self, app: Flask, key: str) -> FlaskClient:
        client = app.test_client()
        client.environ_base["HTTP_X_API_KEY"] = key
        return client


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    settings = Settings(data_dir=tmp_path, model_path=Path("pretend"), durable=False)
    redis = FakeRedis()
    site = Site(create_app(settings, redis), redis)
    yield site
    site.archive.close()


def test_an_archived_job_is_read_by_its_owner_and_admins(site: Site) -> None:
    view = site.client.get(site.path).json
    assert view and (view["archived"], view["status"], view["output"]["text"]) == (True, "succeeded", "the text")
    assert site.admin.get(site.path).status_code == 200
    assert site.other.get(site.path).status_code == 404
    request = site.client.get(f"{site.path}/request").json
    assert request and request["prompt"] == "what was asked"


def test_lists_and_searches_continue_in_the_archive(site: Site) -> None:
    page = site.client.get("/v1/jobs?metadata=team=x&status=succeeded").json
    assert page and page["complete"] and page["next"] is None
    assert [(job["id"], job["output"]["text"]) for job in page["data"]] == [(site.id, "the text")]
    for path in ("/v1/jobs", "/v1/jobs?metadata=team=y"):
        assert site.other.get(path).json == {"object": "list", "data": [], "next": None, "complete": True}
    everything = site.admin.get("/v1/jobs?key=all").json
    assert everything and [job["id"] for job in everything["data"]] == [site.id]


def test_conditions_of_a_search_are_limited(site: Site) -> None:
    conditions = [f"metadata=name{number}=value" for number in range(17)]
    refused = site.client.get(f"/v1/jobs?{'&'.join(conditions)}")
    assert (refused.status_code, refused.json and refused.json["field"]) == (422, "metadata")
    page = site.client.get(f"/v1/jobs?{'&'.join(conditions[1:])}").json
    assert page and (page["data"], page["complete"]) == ([], True)


def test_the_console_shows_archived_jobs(site: Site) -> None:
    assert site.id in site.console("/console/jobs")[1]
    status, page = site.console(f"/console/jobs/{site.id}")
    assert status == 200 and "what was asked" in page and "the text" in page
    assert ">archived<" in page and "Log replay" not in page


def test_an_archived_job_has_no_events_and_cannot_be_cancelled(site: Site) -> None:
    expired = site.client.get(f"{site.path}/stream")
    assert (expired.status_code, expired.json and expired.json["code"]) == (410, "log_expired")
    assert site.client.get(f"{site.path}/stream?starting_after=4").status_code == 204
    ended = site.client.post(f"{site.path}/cancel")
    assert (ended.status_code, ended.json and ended.json["code"]) == (409, "job_ended")
    assert site.other.post(f"{site.path}/cancel").status_code == 404


def test_an_archived_job_runs_again(site: Site) -> None:
    response = site.client.post(f"{site.path}/retry")
    assert response.status_code == 202 and response.json
    again = site.services.jobs.get(response.json["id"], site.owner)
    assert again.status is Status.QUEUED
    assert site.services.stored_requests.get(again).request.prompt == "what was asked"


def test_deleting_an_archived_job_hides_it_at_once(site: Site) -> None:
    assert site.other.delete(site.path).status_code == 404
    assert site.client.delete(site.path).status_code == 204
    assert site.client.get(site.path).status_code == 404
    assert site.client.delete(site.path).status_code == 404
    page = site.admin.get("/v1/jobs?key=all").json
    assert page and page["data"] == []
    assert list(site.services.archive_queue.deleted(5)) == [site.id]


def test_a_broken_archive_breaks_only_what_is_in_it(site: Site) -> None:
    site.archive.file.write_bytes(b"no database")
    page = site.client.get("/v1/jobs").json
    assert page and (page["data"], page["complete"]) == ([], False)
    missing = site.client.get(site.path)
    assert (missing.status_code, missing.json and missing.json["code"]) == (503, "archive_unavailable")
    status, listed = site.console("/console/jobs")
    assert status == 200 and "archive cannot be read" in listed


@pytest.mark.parametrize("revoked_before", [False, True])
def test_a_key_is_revoked_and_purged(site: Site, *, revoked_before: bool) -> None:
    path, purges = f"/v1/keys/{site.owner}", site.services.purges
    if revoked_before:
        assert site.admin.delete(path).status_code == 200
        assert site.admin.delete(path).status_code == 404
        assert purges.pending() == {}
    assert site.admin.delete(f"{path}?purge=perhaps").status_code == 422
    assert site.client.delete(f"{path}?purge=true").status_code in (401, 403)
    assert site.admin.delete(f"{path}?purge=true").status_code == 200
    assert list(purges.pending()) == [site.owner]
    assert site.client.get("/v1/jobs").status_code == 401


def test_everything_of_a_purged_key_is_erased(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A running job is cancelled first, and what is written meanwhile is erased in a later round."""
    monkeypatch.setattr(key_eraser, "_PAUSE_S", 0.0)
    current, client = site.services, site.redis
    worker = lease(client, "w")
    kept = submit(current.jobs, "another")
    running, queued = submit(current.jobs, site.owner), submit(current.jobs, site.owner)
    claimed = next(each for each in reserved(worker, 3) if each.job.id == running.id)
    worker.append([row(claimed, start=True)])
    for root in (current.settings.files_path, current.settings.responses_path):
        (root / site.owner).mkdir(parents=True)
    current.purges.request(site.owner)
    KeyEraser(current, leads=lambda: False).round()
    assert site.archive.find(site.id) is not None, "a process that ends stops at once"
    eraser = KeyEraser(current)
    eraser.round()
    assert client.hget(keys.JOB + running.id, "stop_as") == "cancelled"
    assert site.archive.find(site.id) is None
    assert not (current.settings.files_path / site.owner).exists()
    worker.append([row(claimed, ending=Ending(Status.CANCELLED))])
    eraser.round()
    eraser.round()
    for job in (running, queued):
        with pytest.raises(NotFound):
            current.jobs.get(job.id, None)
    assert current.jobs.get(kept.id, "another").status is Status.QUEUED
    assert list(current.purges.pending()) == [site.owner], "requests that were under way may still submit jobs"
    monkeypatch.setattr(key_eraser, "SETTLED_S", -1.0)
    KeyEraser(current, leads=lambda: False).round()
    assert list(current.purges.pending()) == [site.owner], "the next leader makes sure that nothing is left"
    eraser.round()
    assert current.purges.pending() == {}
