"""The clients of a soak: sessions of many kinds, which start at random times and are followed to their end.

A session is one use of the service: a native job, a chat, a response, a message, a batch, or a client that disconnects.
"""

from __future__ import annotations

import json
import logging
import random
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Final, Self

import httpx2

from scripts.client.api import Client, ClientError, Json, Unreachable
from scripts.client.retries import RetriesExhausted, RetryPolicy
from tests.chaos.checks import Finding, Outcomes, Violation
from tests.chaos.clients import MAX_JOB_S, MAX_OUTAGE_S, JobClient
from tests.support.receivers import Receiver

log = logging.getLogger(__name__)

_BATCH_LINES: Final = 6
_POLL_S: Final = 1.0
_BODIES: Final = 24
"""Number of different chats: each is repeated often, and must always give the same text."""
_WORDS: Final = "river stone light morning paper water garden house road table winter letter".split()  # noqa: SIM905

WEIGHTS: Final[dict[str, float]] = {
    "native": 8,
    "webhook": 1,
    "chat": 2,
    "chat_stream": 3,
    "disconnect": 1,
    "response": 1,
    "background_response": 1,
    "message": 1,
    "message_stream": 1,
    "batch": 0.3,
}
"""How often each kind of session starts. Native jobs are streamed, polled, cancelled, abandoned, or have deadlines."""


class Failed(Exception):
    """A session did not get its answer."""


class Sessions:
    """Runs single sessions and checks their results. Threads may share it.

    Attributes:
        ended: number of sessions by kind.
    """

    def __init__(self, client: Client, jobs: JobClient, outcomes: Outcomes, receiver: Receiver, model: str) -> None:
        self.ended: Counter[str] = Counter()
        self._client = client
        self._jobs = jobs
        self._outcomes = outcomes
        self._receiver = receiver
        self._model = model
        self._retries = RetryPolicy(MAX_OUTAGE_S, threading.Event())
        self._texts: dict[str, str] = {}
        self._lock = threading.Lock()

    def continued(self, client: Client, jobs: JobClient) -> Self:
        """Return sessions with another client, which expect the same texts."""
        other = type(self)(client, jobs, self._outcomes, self._receiver, self._model)
        other._texts = self._texts
        return other

    def run_one(self, rng: random.Random) -> None:
        """Run a session of a random kind, and record the result."""
        (kind,) = rng.choices(tuple(WEIGHTS), weights=tuple(WEIGHTS.values()))
        run: Callable[[random.Random], None] = getattr(self, f"_{kind}")
        try:
            run(rng)
        except (Failed, ClientError, RetriesExhausted) as error:
            self._outcomes.add_finding(Finding(Violation.LOST, kind, f"{type(error).__name__}: {error}"))
        except Exception as error:
            log.exception("a session failed")
            self._outcomes.add_finding(Finding(Violation.WRONG, kind, repr(error)))
        with self._lock:
            self.ended[kind] += 1

    def _native(self, rng: random.Random) -> None:
        self._jobs.run_one(rng)

    def _webhook(self, rng: random.Random) -> None:
        """Submit a job and wait for its webhook."""
        body = {"prompt": _text(rng), "max_tokens": rng.randint(4, 60), "webhook_url": self._receiver.url}
        key = _key(rng)
        job = self._retries.call(lambda: self._client.submit(body, idempotency_key=key))
        self._wait(lambda: job.id in self._delivered(), f"the webhook of {job.id}")

    def _delivered(self) -> set[str]:
        with self._lock:
            received = list(self._receiver.received)
        return {json.loads(each.body)["data"]["id"] for each in received[-2000:] if each.status == 200}

    def _chat(self, rng: random.Random) -> None:
        body = self._chat_body(rng)
        answer = self._post("/v1/chat/completions", body, _key(rng))
        self._check(body["messages"], body["max_tokens"], answer["choices"][0]["message"]["content"])

    def _chat_stream(self, rng: random.Random) -> None:
        body = self._chat_body(rng)
        chunks = self._stream("/v1/chat/completions", {**body, "stream": True}, _key(rng), "[DONE]")
        deltas = (chunk["choices"][0]["delta"] for chunk in chunks if chunk.get("choices"))
        text = "".join(delta.get("content") or "" for delta in deltas)
        self._check(body["messages"], body["max_tokens"], text)

    def _disconnect(self, rng: random.Random) -> None:
        """Leave in the middle of a stream. The job is then cancelled."""
        body = {**self._chat_body(rng), "max_tokens": 300, "stream": True}
        left = rng.randint(1, 20)

        def start() -> None:
            with self._client.stream("POST", "/v1/chat/completions", json=body) as response:
                for number, _ in enumerate(response.iter_lines()):
                    if number >= left:
                        return

        self._retries.call(start)

    def _response(self, rng: random.Random) -> None:
        body, key = self._response_body(rng), _key(rng)
        events = self._stream("/v1/responses", {**body, "stream": True}, key, "response.")
        final = events[-1].get("response", {})
        if final.get("status") not in ("completed", "incomplete"):
            raise Failed(f"a response ended with {events[-1]}")
        self._check(body["input"], body["max_output_tokens"], _output_text(final))

    def _background_response(self, rng: random.Random) -> None:
        body, key = {**self._response_body(rng), "background": True}, _key(rng)
        created = self._post("/v1/responses", body, key)
        final = self._wait(lambda: self._ended_response(created["id"]), f"the end of {created['id']}")
        self._check(body["input"], body["max_output_tokens"], _output_text(final))

    def _ended_response(self, name: str) -> Json | None:
        answer: Json = self._get(f"/v1/responses/{name}").json()
        return answer if answer["status"] not in ("queued", "in_progress") else None

    def _message(self, rng: random.Random) -> None:
        body = self._chat_body(rng)
        answer = self._post("/v1/messages", body, _key(rng))
        self._check(body["messages"], body["max_tokens"], "".join(each["text"] for each in answer["content"]))

    def _message_stream(self, rng: random.Random) -> None:
        body = self._chat_body(rng)
        events = self._stream("/v1/messages", {**body, "stream": True}, _key(rng), "message_stop")
        deltas = (event["delta"] for event in events if event.get("type") == "content_block_delta")
        self._check(body["messages"], body["max_tokens"], "".join(delta["text"] for delta in deltas))

    def _batch(self, rng: random.Random) -> None:
        """Run a batch; each of its lines must have one result."""
        lines = [self._batch_line(rng, number) for number in range(_BATCH_LINES)]
        content = "".join(f"{json.dumps(line)}\n" for line in lines).encode()
        form: dict[str, str | tuple[str, bytes]] = {"purpose": "batch", "file": ("lines.jsonl", content)}
        file = self._retries.call(lambda: self._client.request("POST", "/v1/files", form=form)).json()["id"]
        request = {"input_file_id": file, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
        created = self._retries.call(lambda: self._client.request("POST", "/v1/batches", json=request)).json()
        batch = self._wait(lambda: self._ended_batch(created["id"]), f"the end of {created['id']}")
        if batch["status"] != "completed" or not batch["output_file_id"]:
            raise Failed(f"{created['id']} ended {batch['status']}: {batch['errors']}")
        output = self._get(f"/v1/files/{batch['output_file_id']}/content").text
        results = [json.loads(line) for line in output.splitlines()]
        if sorted(result["custom_id"] for result in results) != [line["custom_id"] for line in lines]:
            raise Failed(f"{created['id']} has the results {[result['custom_id'] for result in results]}")
        by_id = {line["custom_id"]: line["body"] for line in lines}
        for result in results:
            body = by_id[result["custom_id"]]
            text = result["response"]["body"]["choices"][0]["message"]["content"]
            self._check(body["messages"], body["max_tokens"], text)

    def _ended_batch(self, name: str) -> Json | None:
        batch: Json = self._get(f"/v1/batches/{name}").json()
        return batch if batch["status"] in ("completed", "failed", "expired", "cancelled") else None

    def _chat_body(self, rng: random.Random) -> Json:
        text, tokens = _question(rng)
        messages = [{"role": "user", "content": text}]
        return {"model": self._model, "messages": messages, "max_tokens": tokens, "temperature": 0}

    def _response_body(self, rng: random.Random) -> Json:
        text, tokens = _question(rng)
        return {"model": self._model, "input": text, "max_output_tokens": tokens, "temperature": 0}

    def _batch_line(self, rng: random.Random, number: int) -> Json:
        body = self._chat_body(rng)
        return {"custom_id": f"line {number}", "method": "POST", "url": "/v1/chat/completions", "body": body}

    def _check(self, prompt: object, max_tokens: int, text: str) -> None:
        """Check that a greedy request gives the text that it gave before, through whichever API."""
        words = prompt if isinstance(prompt, str) else prompt[0]["content"]  # type: ignore[index]
        with self._lock:
            expected = self._texts.setdefault(f"{max_tokens} {words}", text)
        if text != expected:
            raise Failed(f"{words!r} gave {text!r}, earlier {expected!r}")

    def _get(self, path: str) -> httpx2.Response:
        return self._retries.call(lambda: self._client.request("GET", path))

    def _post(self, path: str, body: Json, key: str) -> Json:
        """Send a request until there is an answer. The key makes the repetitions one job."""
        headers = {"Idempotency-Key": key}
        answer: Json = self._retries.call(
            lambda: self._client.request("POST", path, json=body, headers=headers, wait_s=MAX_OUTAGE_S)
        ).json()
        return answer

    def _stream(self, path: str, body: Json, key: str, end: str) -> list[Json]:
        """Read a whole stream; if it breaks, request it again with the same key."""
        return self._retries.call(lambda: self._read_stream(path, body, key, end))

    def _read_stream(self, path: str, body: Json, key: str, end: str) -> list[Json]:
        events: list[Json] = []
        with self._client.stream("POST", path, json=body, headers={"Idempotency-Key": key}) as response:
            for event in httpx2.EventSource(response, max_event_size=None):
                if event.data == end:
                    return events
                if event.data:
                    events.append(json.loads(event.data))
                    _raise_error(events[-1])
        last = str(events[-1].get("type", "")) if events else ""
        if last == end or (last.startswith(end) and last.endswith(("completed", "incomplete"))):
            return events
        raise Unreachable(f"a stream of {path} broke after {len(events)} events")

    def _wait(self, probe: Callable[[], Any], what: str) -> Any:
        deadline = time.monotonic() + MAX_JOB_S
        while not (value := probe()):
            if time.monotonic() > deadline:
                raise Failed(f"not within {MAX_JOB_S:.0f} s: {what}")
            time.sleep(_POLL_S)
        return value


def _raise_error(event: Mapping[str, Any]) -> None:
    """Raise if an event of a stream is an error, such as the one that a restarting API process sends."""
    if event.get("error") or event.get("type") == "error":
        raise Unreachable(f"a stream ended with {event}")


def _key(rng: random.Random) -> str:
    return uuid.UUID(int=rng.getrandbits(128)).hex


def _text(rng: random.Random) -> str:
    return " ".join(rng.choices(_WORDS, k=rng.randint(3, 25)))


def _question(rng: random.Random) -> tuple[str, int]:
    """Draw one of the texts that are repeated, with its number of tokens."""
    own = random.Random(rng.randrange(_BODIES))
    return _text(own), own.randint(4, 150)


def _output_text(response: Json) -> str:
    return "".join(part["text"] for item in response["output"] if item["type"] == "message" for part in item["content"])
