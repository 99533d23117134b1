"""What a program outside says to the API: jobs, their events, and what goes wrong as exceptions.

ClientError
├── Unreachable    no answer came, or one that is not the API's: the same request may succeed later
└── Refused        the API said no: `status` (HTTP), `code`, and perhaps `retry_after` seconds
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Self

import httpx2

from shared.jobs.log import Event, EventKind, event_kind
from shared.jobs.record import Status

Json = dict[str, Any]

ANSWER_S = 15.0
"""An answer takes at most this long, beside the time it was asked to wait."""
SILENCE_S = 60.0
"""A stream, which has heartbeats, is broken when nothing comes for longer."""
RECONNECTS = 10
"""A stream is given up after as many connections in a row that brought no event; an API that restarts takes less."""
LONGEST_PAUSE_S = 3.0
END_POLL_S = 20
"""A job whose stream is gone is asked for again and again; the API holds each answer back for so long."""


class ClientError(Exception):
    """The request had no success; the message is a line for a person."""


class Unreachable(ClientError):
    """No answer, or none that the API would give."""


class Refused(ClientError):
    """An answer that says no."""

    def __init__(self, status: int, code: str, detail: str, retry_after: float | None = None) -> None:
        super().__init__(detail)
        self.status = status
        self.code = code
        self.retry_after = retry_after

    @classmethod
    def from_response(cls, response: httpx2.Response) -> Self:
        """Read a problem document, or make do with the bare status."""
        problem = _object(response) or {}
        detail = str(problem.get("detail") or problem.get("title") or response.reason_phrase)
        return cls(response.status_code, str(problem.get("code", "")), detail, _retry_after(response))


@dataclass(frozen=True, slots=True)
class RemoteJob:
    """A job as the API shows it."""

    id: str
    status: Status
    text: str
    finish_reason: str | None
    usage: Json
    timings: Json
    error: Json | None
    actions: list[Json] | None = None
    parse_error: str | None = None

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
            actions=output.get("actions"),
            parse_error=output.get("parse_error"),
        )


class Client:
    """One service and one key; may be shared by threads.

    Every method raises `Unreachable` or `Refused`, and tries once: how patient to be is the caller's matter.
    """

    def __init__(self, url: str, key: str = "", *, connections: int = 4) -> None:
        self._http = httpx2.Client(
            base_url=url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=ANSWER_S,
            limits=httpx2.Limits(max_connections=connections, max_keepalive_connections=connections),
            # A proxy of the environment knows the way to other machines, not to this one.
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
        wait_s: float = 0,
    ) -> httpx2.Response:
        """The answer to any request, when it is a success.

        `wait_s` is how long the API was asked to hold the answer back: the client then waits for longer.
        """
        with _transport_errors():
            timeout = ANSWER_S + wait_s
            response = self._http.request(method, path, json=json, headers=headers, timeout=timeout)
        if not response.is_success:
            raise Refused.from_response(response)
        return response

    def submit(self, body: Json, *, idempotency_key: str = "", wait_s: int = 0) -> RemoteJob:
        """Hand in a job, and wait up to `wait_s` seconds for its end."""
        headers = {"Idempotency-Key": idempotency_key} if idempotency_key else {}
        if wait_s:
            headers["Prefer"] = f"wait={wait_s}"
        return _job(self.request("POST", "/v1/jobs", json=body, headers=headers, wait_s=wait_s))

    def job(self, job_id: str, *, wait_s: int = 0) -> RemoteJob:
        """A job, at the latest after `wait_s` seconds, earlier when it ends."""
        query = f"?wait={wait_s}" if wait_s else ""
        return _job(self.request("GET", f"/v1/jobs/{job_id}{query}", wait_s=wait_s))

    def cancel(self, job_id: str) -> RemoteJob:
        """Ask for a job's end."""
        return _job(self.request("POST", f"/v1/jobs/{job_id}/cancel"))

    def events(self, job_id: str, *, after: int = 0) -> Generator[Event]:
        """A job's events behind the cursor, to the last one; a cut stream is taken up where it was cut.

        Where the job's log does not reach back that far any more, only the end comes, under the number 0: its data is
        the whole job, and the job's text all that is left of the chunks.
        """
        fruitless = 0
        while True:
            try:
                for event in self._listen(job_id, after):
                    after, fruitless = event.n, 0
                    yield event
                    if event.kind is EventKind.DONE:
                        return
            except Unreachable:
                if fruitless >= RECONNECTS:
                    raise
            fruitless += 1
            if fruitless > RECONNECTS:
                raise Unreachable(f"the stream of {job_id} ends again and again before the job does")
            time.sleep(min(LONGEST_PAUSE_S, 0.1 * 2**fruitless))

    def _listen(self, job_id: str, after: int) -> Iterator[Event]:
        headers = {"Accept": "text/event-stream", "Last-Event-ID": str(after)}
        try:
            with self.stream("GET", f"/v1/jobs/{job_id}/stream", headers=headers) as response:
                for event in httpx2.EventSource(response, max_event_size=None):
                    if event.data:  # a `retry` alone is no event, though the reader here makes one of it
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
        """Like `request`, with the body still to be read."""
        timeout = httpx2.Timeout(ANSWER_S, read=SILENCE_S)
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


def _job(response: httpx2.Response) -> RemoteJob:
    try:
        return RemoteJob.from_json(response.json())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Unreachable(f"{response.url} answered something that is no job") from error


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
