"""A client of the API: jobs and their events.

ClientError
├── Unreachable    no response, or none from this API; the same request may succeed later
└── Refused        an error response with `status` (HTTP), `code` and possibly `retry_after` in seconds
"""

from __future__ import annotations

import time
from collections.abc import Collection, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Self

import httpx2

from shared.jobs.log import Event, EventKind, event_kind
from shared.jobs.record import Status

Json = dict[str, Any]

RESPONSE_TIMEOUT_S = 15.0
"""Maximum time for a response, in addition to the requested wait."""
STREAM_TIMEOUT_S = 60.0
"""Maximum silence on a stream. The API sends heartbeats more often."""
MAX_RECONNECTS = 10
"""Maximum number of consecutive connections without an event. A restart of the API takes fewer."""
MAX_PAUSE_S = 3.0
END_POLL_S = 20
"""Duration of each long poll for the end of a job whose log has expired."""


class ClientError(Exception):
    """The request failed. The message is one line for the user."""


class Unreachable(ClientError):
    """No response, or none from this API."""


class Refused(ClientError):
    """The API answered with an error."""

    def __init__(self, status: int, code: str, detail: str, retry_after: float | None = None) -> None:
        super().__init__(detail)
        self.status = status
        self.code = code
        self.retry_after = retry_after

    @classmethod
    def from_response(cls, response: httpx2.Response) -> Self:
        """Read a problem document; if there is none, use the HTTP status."""
        problem = _object(response) or {}
        if isinstance(error := problem.get("error"), dict):  # OpenAI's format
            problem = {"detail": error.get("message"), "code": error.get("code") or ""}
        detail = str(problem.get("detail") or problem.get("title") or response.reason_phrase)
        return cls(response.status_code, str(problem.get("code", "")), detail, _retry_after(response))


@dataclass(frozen=True, slots=True)
class RemoteJob:
    """A job as returned by the API."""

    id: str
    status: Status
    text: str
    finish_reason: str | None
    usage: Json
    timings: Json
    error: Json | None
    actions: list[Json] | None = None
    regions: list[Json] | None = None
    parse_error: str | None = None
    message: Json | None = None

    @classmethod
    def from_json(cls, data: Json) -> Self:
        """Read the API's job object."""
        output = data.get("output") or {}
        return cls(
            id=data["id"],
            status=Status.read(data["status"], finished=data.get("finished_at") is not None),
            text=output.get("text") or "",
            finish_reason=output.get("finish_reason"),
            usage=data.get("usage") or {},
            timings=data.get("timings") or {},
            error=data.get("error"),
            actions=data.get("actions"),
            regions=data.get("regions"),
            parse_error=data.get("parse_error"),
            message=data.get("message"),
        )


class Client:
    """A client for one service and one API key. Threads may share it.

    Every method raises `Unreachable` or `Refused`. Requests are not retried; see `scripts.client.retries`.
    """

    def __init__(self, url: str, key: str = "", *, connections: int = 4) -> None:
        self._http = httpx2.Client(
            base_url=url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=RESPONSE_TIMEOUT_S,
            limits=httpx2.Limits(max_connections=connections, max_keepalive_connections=connections),
            # Ignore proxies from the environment for services on this machine.
            trust_env=httpx2.URL(url).host not in ("127.0.0.1", "::1", "localhost"),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def request(
        self,
        method: str,
        path: str,
        *,
        json: Json | None = None,
        headers: Mapping[str, str] | None = None,
        form: Mapping[str, str | tuple[str, bytes]] | None = None,
        wait_s: float = 0,
        also: Collection[int] = (),
    ) -> httpx2.Response:
        """Send a request and return a successful response.

        Args:
            form: fields of a multipart form: texts, and files as name and content.
            wait_s: duration of the long poll that the request asks for; extends the timeout.
            also: statuses of errors whose response is returned, too.
        """
        with _transport_errors():
            timeout = RESPONSE_TIMEOUT_S + wait_s
            response = self._http.request(method, path, json=json, headers=headers, files=_form(form), timeout=timeout)
        if not response.is_success and response.status_code not in also:
            raise Refused.from_response(response)
        return response

    def submit(self, body: Json, *, idempotency_key: str = "", wait_s: int = 0) -> RemoteJob:
        """Submit a job and wait up to `wait_s` seconds for its end."""
        headers = {"Idempotency-Key": idempotency_key} if idempotency_key else {}
        if wait_s:
            headers["Prefer"] = f"wait={wait_s}"
        return _job(self.request("POST", "/v1/jobs", json=body, headers=headers, wait_s=wait_s))

    def complete(self, url: str, body: Json, *, idempotency_key: str, wait_s: int) -> Json | None:
        """Send a request to a route of OpenAI's API; None if there is no answer after about `wait_s` seconds.

        The job then continues: the same call finds it again.
        """
        headers = {"Idempotency-Key": idempotency_key}
        try:
            response = self.request("POST", url, json=body, headers=headers, wait_s=wait_s)
        except Unreachable as error:
            if isinstance(error.__cause__, httpx2.ReadTimeout):
                return None
            raise
        answer = _object(response)
        if answer is None or not (answer.get("choices") or answer.get("object") == "response"):
            raise Unreachable(f"{response.url} returned something that is not an answer")
        return answer

    def job(self, job_id: str, *, wait_s: int = 0) -> RemoteJob:
        """Return a job when it has ended, or after `wait_s` seconds."""
        query = f"?wait={wait_s}" if wait_s else ""
        return _job(self.request("GET", f"/v1/jobs/{job_id}{query}", wait_s=wait_s))

    def cancel(self, job_id: str) -> RemoteJob:
        """Cancel a job."""
        return _job(self.request("POST", f"/v1/jobs/{job_id}/cancel"))

    def events(self, job_id: str, *, after: int = 0) -> Generator[Event]:
        """Generate a job's events after a cursor, up to the last one; reconnect if the stream breaks.

        If the job's log has expired, the only event is the end, with number 0. Its data is the job with its whole text.
        """
        empty_connections = 0
        while True:
            try:
                for event in self._listen(job_id, after):
                    after, empty_connections = event.n, 0
                    yield event
                    if event.kind is EventKind.DONE:
                        return
            except Unreachable:
                if empty_connections >= MAX_RECONNECTS:
                    raise
            empty_connections += 1
            if empty_connections > MAX_RECONNECTS:
                raise Unreachable(f"the stream of {job_id} keeps ending before the job does")
            time.sleep(min(MAX_PAUSE_S, 0.1 * 2**empty_connections))  # back off while the service restarts

    def _listen(self, job_id: str, after: int) -> Iterator[Event]:
        headers = {"Accept": "text/event-stream", "Last-Event-ID": str(after)}
        try:
            with self.stream("GET", f"/v1/jobs/{job_id}/stream", headers=headers) as response:
                for event in httpx2.EventSource(response, max_event_size=None):
                    if event.data:  # the library also yields an event for a `retry` field alone
                        yield Event(int(event.id), event_kind(event.event), event.data)
        except Refused as error:
            if error.status != HTTPStatus.GONE:
                raise
            yield self._end(job_id)

    def _end(self, job_id: str) -> Event:
        while True:
            response = self.request("GET", f"/v1/jobs/{job_id}?wait={END_POLL_S}", wait_s=END_POLL_S)
            if _job(response).status.terminal:
                return Event(0, EventKind.DONE, response.text)

    @contextmanager
    def stream(
        self, method: str, path: str, *, json: Json | None = None, headers: Mapping[str, str] | None = None
    ) -> Iterator[httpx2.Response]:
        """Like `request`, but the caller reads the body."""
        timeout = httpx2.Timeout(RESPONSE_TIMEOUT_S, read=STREAM_TIMEOUT_S)
        with (
            _transport_errors(),
            self._http.stream(method, path, json=json, headers=headers, timeout=timeout) as response,
        ):
            if not response.is_success:
                response.read()
                raise Refused.from_response(response)
            yield response


@contextmanager
def _transport_errors() -> Iterator[None]:
    try:
        yield
    except httpx2.TransportError as error:
        raise Unreachable(str(error) or type(error).__name__) from error


def _form(fields: Mapping[str, str | tuple[str, bytes]] | None) -> dict[str, Any] | None:
    """Return a form as the library wants it: a field without a file name is a text."""
    if fields is None:
        return None
    return {name: (None, value) if isinstance(value, str) else value for name, value in fields.items()}


def _job(response: httpx2.Response) -> RemoteJob:
    try:
        return RemoteJob.from_json(response.json())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Unreachable(f"{response.url} returned something that is not a job") from error


def _object(response: httpx2.Response) -> Json | None:
    try:
        data = response.json()
    except ValueError:
        return None
    return data if isinstance(data, dict) else None


def _retry_after(response: httpx2.Response) -> float | None:
    try:
        return max(0.0, float(response.headers["Retry-After"]))
    except (KeyError, ValueError):
        return None
