"""The API behind Debian's nginx with deploy/nginx.conf: TLS, streams without buffering, disconnects, limits."""

from __future__ import annotations

import getpass
import re
import shutil
import ssl
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from scripts.stack.ports import free_port
from shared.settings import ROOT
from tests.plugins.web_stack import StubWorker, WebStack
from tests.support.tls import Authority
from tests.support.waiting import eventually

NGINX = shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/sbin:/usr/local/bin")
StartWorker = Callable[..., StubWorker]

pytestmark = pytest.mark.skipif(NGINX is None, reason="nginx is not installed: apt-get install nginx-light")


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="mlxq-") as path:
        yield Path(path)


@pytest.fixture(scope="module")
def authority(folder: Path) -> Authority:
    return Authority.create(folder / "certificates")


def configuration(web: WebStack, authority: Authority, folder: Path, port: int) -> str:
    """Return deploy/nginx.conf in a complete configuration, with this test's ports, files and addresses."""
    server = (ROOT / "deploy/nginx.conf").read_text()
    for pattern, replacement in (
        (r"listen 443 ssl", f"listen 127.0.0.1:{port} ssl"),
        (r"/etc/ssl/\S+\.crt", str(authority.cert_file)),
        (r"/etc/ssl/\S+\.key", str(authority.key_file)),
        (r"http://127\.0\.0\.1:8080", web.url),
    ):
        server, count = re.subn(pattern, replacement, server)
        assert count == 1, pattern
    folders = "".join(
        f"{name}_temp_path {folder}/{name};\n" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    return f"""
daemon off;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
worker_processes 1;
user {getpass.getuser()};
events {{}}
http {{
access_log {folder}/access.log;
{folders}
{server}
}}
"""


@pytest.fixture(scope="module")
def proxy(web: WebStack, authority: Authority, folder: Path) -> Iterator[httpx2.Client]:
    """A client of the API that connects through nginx and knows the test's CA."""
    assert NGINX
    port = free_port()
    config = folder / "nginx.conf"
    config.write_text(configuration(web, authority, folder, port))
    with subprocess.Popen([NGINX, "-e", str(folder / "error.log"), "-c", str(config)]) as nginx:
        try:
            with httpx2.Client(
                base_url=f"https://127.0.0.1:{port}",
                headers={"X-API-Key": web.key},
                verify=ssl.create_default_context(cafile=str(authority.ca_file)),
                timeout=30,
            ) as client:
                eventually(lambda: nginx.poll() is not None or answers(client), "nginx answers")
                assert nginx.poll() is None, (folder / "error.log").read_text()
                yield client
        finally:
            nginx.terminate()


def answers(client: httpx2.Client) -> bool:
    try:
        return client.get("/livez").is_success
    except httpx2.TransportError:
        return False


def newest(web: WebStack) -> dict[str, Any]:
    job: dict[str, Any] = web.http.get("/v1/jobs", params={"limit": 1}).json()["data"][0]
    return job


def test_events_of_a_stream_arrive_while_the_job_runs(
    web: WebStack, proxy: httpx2.Client, start_worker: StartWorker
) -> None:
    worker = start_worker()
    worker.hold.set()
    job = proxy.post("/v1/jobs", json={"prompt": "hi", "max_tokens": 3})
    assert job.status_code == 202
    with proxy.stream("GET", f"/v1/jobs/{job.json()['id']}/stream") as stream:
        lines = (line for line in stream.iter_lines() if line.startswith("event:"))
        assert next(lines) == "event: queued"
        assert "event: started" in lines
        assert web.job(job.json()["id"])["status"] == "running"
        worker.hold.clear()
        assert "event: done" in lines


def test_a_disconnect_is_passed_on(web: WebStack, proxy: httpx2.Client, start_worker: StartWorker) -> None:
    start_worker().hold.set()
    with proxy.stream("POST", "/inference", json={"prompt": "hi", "stream": True}) as stream:
        next(stream.iter_lines())
    assert web.job(newest(web)["id"], wait=10)["status"] == "cancelled"


def test_each_answer_has_a_request_id(proxy: httpx2.Client) -> None:
    ids = [proxy.get("/livez").headers["X-Request-ID"] for _ in range(2)]
    assert all(re.fullmatch("[0-9a-f]{32}", each) for each in ids) and ids[0] != ids[1]


def test_bodies_may_have_the_size_that_the_api_accepts(proxy: httpx2.Client) -> None:
    large = proxy.post("/v1/jobs", json={"prompt": "x" * 8_000_000})
    assert large.headers["Content-Type"] != "text/html", "the API answers, not nginx"
    assert proxy.post("/v1/jobs", json={"prompt": "x" * 17_000_000}).status_code == 413


def test_metrics_are_not_exposed(proxy: httpx2.Client) -> None:
    assert proxy.get("/metrics").status_code == 403
