"""A start that cannot succeed ends with the reason of the child that failed: every child, every kind of failure."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from scripts.stack import config, preflight, processes, startup
from scripts.stack.failure import StartFailed
from scripts.stack.ports import free_port
from scripts.stack.stack import Stack
from scripts.stack.terminal import Terminal
from shared.settings import Settings

REASON = "the child's own reason"
STUB = f"""
import http.server, json, os, signal, sys

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = json.dumps({{"reasons": ["No worker is ready."]}}).encode()
        self.send_response(int(sys.argv[2]) if self.path != "/livez" else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

def serve():
    http.server.HTTPServer(("127.0.0.1", int(sys.argv[3])), Handler).serve_forever()

print(json.dumps({{"level": "ERROR", "message": {REASON!r}}}), flush=True)
match sys.argv[1]:
    case "configuration": sys.exit({config.EXIT_CONFIG})
    case "crash": sys.exit(1)
    case "kill": os.kill(os.getpid(), signal.SIGKILL)
    case "hang": signal.pause()
    case "serve": serve()
"""
CHILDREN = ("valkey", "worker", "web", "flower")
FAILURES = ("configuration", "crash", "kill", "hang")


class NoSignals:
    """In place of `StopSignals`, which would replace pytest's signal handlers."""

    hung_up = False

    def pause(self, seconds: float) -> None:
        time.sleep(seconds)

    def ignore(self) -> None:
        """There are no handlers."""


@pytest.fixture
def settings() -> Iterator[Settings]:
    """A DATA_DIR with a short path: the path of a Unix socket is limited."""
    with tempfile.TemporaryDirectory(prefix="mlxq") as home:
        settings = Settings(_env_file=None, data_dir=Path(home) / "d", port=free_port(), flower_port=free_port())
        preflight.prepare_data_dir(settings)
        try:
            yield settings
        finally:
            processes.terminate_all(settings.data_dir, grace_s=0)


def stub_programs(settings: Settings, failing: str, failure: str) -> list[config.Program]:
    """Replace the failing program and all Python programs by stubs. Valkey is real unless it is to fail."""
    file = settings.data_dir / "stub.py"
    file.write_text(STUB)
    ports = {"web": settings.port, "flower": settings.flower_port}
    api_status = 503 if failing == "worker" else 200

    def stub(program: config.Program) -> config.Program:
        mode = failure if program.name == failing else "serve" if program.name in ports else "hang"
        port = ports.get(program.name, 0)
        return replace(program, command=(sys.executable, str(file), mode, str(api_status), str(port)))

    return [each if each.name == "valkey" != failing else stub(each) for each in config.programs(settings)]


def start(settings: Settings) -> None:
    environment = config.child_environment(settings, processes.stack_id(settings.data_dir), Path("/dev/null"))
    stack = Stack(settings, environment, Terminal(), NoSignals())  # type: ignore[arg-type]
    try:
        stack.bring_up()
    finally:
        stack.bring_down()


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("child", CHILDREN)
def test_a_start_that_cannot_succeed_ends_with_the_reason(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, child: str, failure: str
) -> None:
    monkeypatch.setattr(startup, "RESPONSE_S", 10.0)
    stubs = stub_programs(settings, child, failure)
    monkeypatch.setattr(config, "programs", lambda _: stubs)
    earlier = settings.log_dir / f"{child}.log"
    earlier.write_text(json.dumps({"level": "ERROR", "message": "the reason of an earlier start"}) + "\n")
    with pytest.raises(StartFailed, match=rf"^{child}.* {REASON}") as failed:
        start(settings)
    assert "\n" not in str(failed.value)
    assert not processes.find(settings.data_dir)


@pytest.mark.parametrize(("child", "port"), [("web", "PORT"), ("flower", "FLOWER_PORT")])
def test_a_port_that_becomes_taken_during_the_start_is_named(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, child: str, port: str
) -> None:
    stubs = stub_programs(settings, child, "crash")
    monkeypatch.setattr(config, "programs", lambda _: stubs)
    (settings.data_dir / "stub.py").write_text(STUB.replace(REASON, "[Errno 98] Address already in use"))
    with pytest.raises(StartFailed, match=rf"^{child} did not start: port \d+ is taken; set {port} to another"):
        start(settings)
