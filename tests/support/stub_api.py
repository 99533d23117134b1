"""A stub of the API's `/v1/jobs` that can fail on demand, for tests of clients."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal, Self

KEY = "mlxq_stub"
CHUNKS = ("Once", " upon", " a", " time", ", é", "\n\n.")

Failure = Literal["limited", "unavailable", "dropped_request", "dropped_response"]
"""Status 429 or 503, or a connection that is closed before or after the request is processed."""


class State:
    """State that survives a restart of the server."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.jobs: dict[str, dict[str, Any]] = {}
        self.sent: list[tuple[str, dict[str, Any]]] = []
        self.jobs_by_key: dict[str, str] = {}
        self.hold_jobs = False
        self.on_submit: Callable[[], object] = lambda: None
        self.failures: Iterator[Failure | None] = iter(())

    def submit(self, key: str, body: dict[str, Any]) -> dict[str, Any]:
        """Accept a job, or return the one accepted with the same key."""
        self.on_submit()
        with self.changed:
            if key not in self.jobs_by_key:
                self.jobs_by_key[key] = f"job_{len(self.jobs) + 1}"
                self.jobs[self.jobs_by_key[key]] = body
                self.sent.append((key, body))
                self.changed.notify_all()
            return self.view(self.jobs_by_key[key])

    def wait(self, job_id: str, seconds: float) -> dict[str, Any]:
        """Return a job when it has ended, or after `seconds`."""
        with self.changed:
            self.changed.wait_for(lambda: self.view(job_id)["status"] != "running", seconds)
            return self.view(job_id)

    def wait_sent(self, count: int) -> None:
        """Wait until `count` jobs have been accepted."""
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.sent) >= count, 30)

    def hold(self, hold_jobs: bool) -> None:
        """Keep jobs running, or let them end."""
        with self.changed:
            self.hold_jobs = hold_jobs
            self.changed.notify_all()

    def view(self, job_id: str) -> dict[str, Any]:
        """Return a job as the API does; the output is the prompt in upper case."""
        prompt = self.jobs[job_id]["prompt"]
        job = {"id": job_id, "status": "succeeded", "output": {"text": prompt.upper(), "finish_reason": "stop"}}
        if self.hold_jobs and "quick" not in prompt:
            job = {"id": job_id, "status": "running", "output": {"text": "", "finish_reason": None}}
        elif "fail" in prompt and job_id == self.first(prompt):
            job = {**job, "status": "failed", "error": {"code": "worker_lost", "message": "lost"}}
        return {**job, "usage": {"completion_tokens": 3}, "timings": {"total_s": 0.1}}

    def first(self, prompt: str) -> str:
        """Return the first job with this prompt."""
        return next(job_id for job_id, body in self.jobs.items() if body["prompt"] == prompt)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are sent in two writes
    server: StubApi

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self._answer(lambda: self._submit(body))

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        if path == "/v1/jobs":
            self._answer(lambda: (200, {"data": []}), failure=None)
        elif path.endswith("/stream"):
            self._stream(int(self.headers.get("Last-Event-ID", 0)))
        else:
            seconds = float(query.removeprefix("wait=") or 0)
            self._answer(lambda: (200, self.server.state.wait(path.rpartition("/")[2], seconds)))

    def _submit(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if body["prompt"] == "":
            return 422, {"code": "invalid_request", "detail": "prompt is empty"}
        return 202, self.server.state.submit(self.headers["Idempotency-Key"], body)

    def _answer(self, act: Any, failure: Failure | Literal["next"] | None = "next") -> None:
        if self.headers.get("Authorization") != f"Bearer {KEY}":
            return self._send(401, {"code": "unauthorized", "detail": "The API key is not valid."})
        if failure == "next":
            with self.server.state.changed:
                failure = next(self.server.state.failures, None)
        if failure == "limited":
            return self._send(429, {"code": "rate_limited"}, {"Retry-After": "0.05"})
        if failure == "unavailable":
            return self._send(503, {"code": "unavailable"}, {"Retry-After": "0"})
        answer = act() if failure != "dropped_request" else None
        if answer is None or failure == "dropped_response":
            self.close_connection = True
            return None
        return self._send(*answer)

    def _send(self, status: int, body: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def _stream(self, after: int) -> None:
        """Send the next two events after the cursor, then close the connection."""
        self.close_connection = True
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        events = [("chunk", json.dumps({"text": text})) for text in CHUNKS] + [("done", "{}")]
        for n, (kind, data) in list(enumerate(events, start=1))[after : after + 2]:
            self.wfile.write(f": beat\n\nid: {n}\nevent: {kind}\ndata: {data}\n\n".encode())

    def log_message(self, *_: object) -> None:
        """Log nothing."""


class StubApi(ThreadingHTTPServer):
    """The server. A second instance with the same state and port is the first one after a restart."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, state: State | None = None, port: int = 0, failures: Iterable[Failure | None] = ()) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.state = state or State()
        self.state.failures = iter(failures)
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01})

    @property
    def url(self) -> str:
        """The base URL."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.state.hold(False)  # end long polls
        self.shutdown()
        self._thread.join()
        self.server_close()
