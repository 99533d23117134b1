"""A stand-in for the API's /v1/jobs, with troubles on demand: what a client must bear is easy to bring about here."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal, Self

KEY = "mlxq_stand-in"
CHUNKS = ("Once", " upon", " a", " time", ", é", "\n\n.")

Trouble = Literal["limited", "unavailable", "deaf", "mute"]
"""429, 503; a connection closed before the request is heeded, and after."""


class State:
    """What outlives a restart of the server."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.jobs: dict[str, dict[str, Any]] = {}
        self.sent: list[tuple[str, dict[str, Any]]] = []
        self.known: dict[str, str] = {}
        self.held = False
        self.on_submit: Callable[[], object] = lambda: None
        self.troubles: Iterator[Trouble | None] = iter(())

    def submit(self, key: str, body: dict[str, Any]) -> dict[str, Any]:
        """Accept a job, or find the one accepted under this key."""
        self.on_submit()
        with self.changed:
            if key not in self.known:
                self.known[key] = f"job_{len(self.jobs) + 1}"
                self.jobs[self.known[key]] = body
                self.sent.append((key, body))
                self.changed.notify_all()
            return self.view(self.known[key])

    def wait(self, job_id: str, seconds: float) -> dict[str, Any]:
        """A job, after a while or when it has ended."""
        with self.changed:
            self.changed.wait_for(lambda: self.view(job_id)["status"] != "running", seconds)
            return self.view(job_id)

    def wait_sent(self, count: int) -> None:
        """Until as many jobs have been accepted."""
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.sent) >= count, 30)

    def hold(self, held: bool) -> None:
        """Let jobs run on without an end, or end them."""
        with self.changed:
            self.held = held
            self.changed.notify_all()

    def view(self, job_id: str) -> dict[str, Any]:
        """A job as the API shows it: the prompt in capitals; a prompt may ask for a failure or for a long time."""
        prompt = self.jobs[job_id]["prompt"]
        job = {"id": job_id, "status": "succeeded", "output": {"text": prompt.upper(), "finish_reason": "stop"}}
        if self.held and "quick" not in prompt:
            job = {"id": job_id, "status": "running", "output": {"text": "", "finish_reason": None}}
        elif "fail" in prompt and job_id == self.first(prompt):
            job = {**job, "status": "failed", "error": {"code": "worker_lost", "message": "lost"}}
        return {**job, "usage": {"completion_tokens": 3}, "timings": {"total_s": 0.1}}

    def first(self, prompt: str) -> str:
        """The job that was first to have this prompt."""
        return next(job_id for job_id, body in self.jobs.items() if body["prompt"] == prompt)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two writes
    server: StandIn

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self._answer(lambda: self._submit(body))

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        if path == "/v1/jobs":
            self._answer(lambda: (200, {"data": []}), trouble=None)
        elif path.endswith("/stream"):
            self._stream(int(self.headers.get("Last-Event-ID", 0)))
        else:
            seconds = float(query.removeprefix("wait=") or 0)
            self._answer(lambda: (200, self.server.state.wait(path.rpartition("/")[2], seconds)))

    def _submit(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if body["prompt"] == "":
            return 422, {"code": "invalid_request", "detail": "prompt is empty"}
        return 202, self.server.state.submit(self.headers["Idempotency-Key"], body)

    def _answer(self, act: Any, trouble: Trouble | Literal["next"] | None = "next") -> None:
        if self.headers.get("Authorization") != f"Bearer {KEY}":
            return self._send(401, {"code": "unauthorized", "detail": "This is not one of our keys."})
        if trouble == "next":
            with self.server.state.changed:
                trouble = next(self.server.state.troubles, None)
        if trouble == "limited":
            return self._send(429, {"code": "rate_limited"}, {"Retry-After": "0.05"})
        if trouble == "unavailable":
            return self._send(503, {"code": "unavailable"}, {"Retry-After": "0"})
        answer = act() if trouble != "deaf" else None
        if answer is None or trouble == "mute":
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
        """Chunks behind the cursor, two a connection; the last event tells the end."""
        self.close_connection = True
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        events = [("chunk", json.dumps({"text": text})) for text in CHUNKS] + [("done", "{}")]
        for n, (kind, data) in list(enumerate(events, start=1))[after : after + 2]:
            self.wfile.write(f": beat\n\nid: {n}\nevent: {kind}\ndata: {data}\n\n".encode())

    def log_message(self, *_: object) -> None:
        """Tests need no access log."""


class StandIn(ThreadingHTTPServer):
    """The server; a restart is leaving one and entering another with the same state and port."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, state: State | None = None, port: int = 0, troubles: Iterable[Trouble | None] = ()) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.state = state or State()
        self.state.troubles = iter(troubles)
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01})

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.state.hold(False)  # nobody stays in a long poll
        self.shutdown()
        self._thread.join()
        self.server_close()
