"""The requests of a run, of every kind, each with the text that it gives without faults.

The stack itself generates the texts before the first fault. The same few requests are repeated, each time interrupted
at another point.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from scripts.client.api import Client, RemoteJob

_WORDS = (  # noqa: SIM905 - easier to read than a list
    "river stone light morning paper water garden house road table winter letter music island forest bridge window "
    "silver number answer engine harbour station village mountain ocean thunder lantern captain orchard"
).split()
_LONG_PROMPT = 120
"""Number of words of a prompt that is prefilled in several chunks."""


class Behaviour(StrEnum):
    """What a client does with its job."""

    STREAMS = "streamed"
    """Reads the stream to its end and reconnects with its cursor if it breaks."""
    RECONNECTS = "left and come back"
    """Disconnects in the middle of the stream and reconnects later with its cursor."""
    POLLS = "polled"
    """Polls with long polls."""
    CANCELS = "cancelled"
    """Cancels the job while it runs."""
    SHORT_DEADLINE = "short deadline"
    """Sets a deadline that may be too short."""

    @property
    def reads_to_end(self) -> bool:
        """Whether the stream is read to its end."""
        return self in (Behaviour.STREAMS, Behaviour.RECONNECTS)


_WEIGHTS = {
    Behaviour.STREAMS: 4,
    Behaviour.RECONNECTS: 2,
    Behaviour.POLLS: 3,
    Behaviour.CANCELS: 1,
    Behaviour.SHORT_DEADLINE: 1,
}


@dataclass(frozen=True, slots=True)
class Reference:
    """The result of a request without faults."""

    text: str
    finish_reason: str | None
    prompt_tokens: int
    completion_tokens: int

    @classmethod
    def of(cls, job: RemoteJob) -> Reference:
        """Return the result of an ended job."""
        return cls(job.text, job.finish_reason, job.usage["prompt_tokens"], job.usage["completion_tokens"])


@dataclass(frozen=True, slots=True)
class Request:
    """The body of a request and its expected result."""

    body: dict[str, Any]
    expected: Reference


class Unstable(Exception):
    """Runs without faults differ, so there is nothing to compare with."""


def prepare_requests(client: Client, seed: int, count: int, directives: str = "") -> list[Request]:
    """Create `count` requests and run them without faults. A third of them get stop strings from their own texts.

    Args:
        directives: prefix of each prompt for the fake model.

    Raises:
        Unstable: a request gave another text in a batch of another size.
    """
    rng = random.Random(seed)
    bodies = [_body(rng, directives) for _ in range(count)]
    texts = _run(client, bodies, concurrency=12)
    bodies = [
        {**body, "stop": _stop_in(rng, reference.text)} if i % 3 == 0 and len(reference.text) > 12 else body
        for i, (body, reference) in enumerate(zip(bodies, texts, strict=True))
    ]
    first, second = _run(client, bodies, concurrency=3), _run(client, bodies, concurrency=16)
    for body, one, other in zip(bodies, first, second, strict=True):
        if one != other:
            raise Unstable(f"{body} gave {one} and then {other}")
    return [Request(body, reference) for body, reference in zip(bodies, first, strict=True)]


def _run(client: Client, bodies: Sequence[dict[str, Any]], concurrency: int) -> list[Reference]:
    with ThreadPoolExecutor(concurrency) as pool:
        return [Reference.of(job) for job in pool.map(lambda body: _to_end(client, body), bodies)]


def _to_end(client: Client, body: dict[str, Any]) -> RemoteJob:
    job = client.submit(body, wait_s=10)
    while not job.status.terminal:
        job = client.job(job.id, wait_s=10)
    return job


def _body(rng: random.Random, directives: str) -> dict[str, Any]:
    long = rng.random() < 0.5
    words = _LONG_PROMPT if rng.random() < 0.15 else rng.randint(3, 25)
    text = directives + " ".join(rng.choices(_WORDS, k=words))
    body: dict[str, Any] = {"seed": 0} if directives else {}  # the fake model derives its words from the seed
    body |= {"max_tokens": rng.randint(150, 500) if long else rng.randint(4, 50)}
    if rng.random() < 0.5:
        body["messages"] = [{"role": "user", "content": text}]
    else:
        body["prompt"] = text
    if rng.random() < 0.6:
        body |= {"temperature": round(rng.uniform(0.3, 1.2), 2), "seed": rng.getrandbits(40)}
        body |= rng.choice(({}, {"top_k": 40}, {"min_p": 0.05}, {"top_p": 0.9}))
    if rng.random() < 0.3:
        body |= rng.choice(({"repetition_penalty": 1.2}, {"presence_penalty": 0.7}, {"frequency_penalty": 0.4}))
    return body


def _stop_in(rng: random.Random, text: str) -> list[str]:
    """Draw a stop string from the second half of a text. It may begin and end inside a token."""
    start = rng.randrange(len(text) // 2, len(text) - 4)
    return [text[start : start + rng.randint(2, 6)]]


def draw(rng: random.Random, requests: Sequence[Request]) -> tuple[Request, Behaviour]:
    """Draw a request and a behaviour."""
    (behaviour,) = rng.choices(tuple(_WEIGHTS), weights=tuple(_WEIGHTS.values()))
    return rng.choice(requests), behaviour
