"""What is asked of the stack while things break: requests of every kind, each with the text it must give.

The texts are the stack's own, from a run that nothing disturbs. Requests are few and repeated often: what counts is
where they are cut, which is another place each time.
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
"""Words of a prompt that takes several chunks to prefill."""


class Style(StrEnum):
    """How a client treats its job."""

    STREAMED = "streamed"
    """Reads the stream to its end, reconnecting with its cursor."""
    LEFT = "left and come back"
    """Goes away in the middle of the stream, and comes back later with its cursor."""
    POLLED = "polled"
    """Asks again and again, each question held back by the API."""
    CANCELLED = "cancelled"
    """Takes it back while it runs."""
    EXPIRED = "short deadline"
    """Gives it less time than it may take."""

    @property
    def reads_on(self) -> bool:
        """Whether the stream is read to its end."""
        return self in (Style.STREAMED, Style.LEFT)


_SHARES = {Style.STREAMED: 4, Style.LEFT: 2, Style.POLLED: 3, Style.CANCELLED: 1, Style.EXPIRED: 1}


@dataclass(frozen=True, slots=True)
class Reference:
    """What a request gives when nothing disturbs it."""

    text: str
    finish_reason: str | None
    prompt_tokens: int
    completion_tokens: int

    @classmethod
    def of(cls, job: RemoteJob) -> Reference:
        """What an ended job gave."""
        return cls(job.text, job.finish_reason, job.usage["prompt_tokens"], job.usage["completion_tokens"])


@dataclass(frozen=True, slots=True)
class Request:
    """The body of a submission, and what it must give."""

    body: dict[str, Any]
    expected: Reference


class Unstable(Exception):
    """Undisturbed runs disagree: there is nothing to compare with."""


def prepare(client: Client, seed: int, count: int, orders: str = "") -> list[Request]:
    """Make `count` requests and run them undisturbed: a third of them once more, with stop strings out of their texts.

    Args:
        orders: beginning of each prompt, for the fake model.

    Raises:
        Unstable: a request gave another text the second time, with other company in the batch.
    """
    rng = random.Random(seed)
    bodies = [_body(rng, orders) for _ in range(count)]
    texts = _run(client, bodies, at_once=12)
    bodies = [
        {**body, "stop": _stop_in(rng, reference.text)} if i % 3 == 0 and len(reference.text) > 12 else body
        for i, (body, reference) in enumerate(zip(bodies, texts, strict=True))
    ]
    first, second = _run(client, bodies, at_once=3), _run(client, bodies, at_once=16)
    for body, one, other in zip(bodies, first, second, strict=True):
        if one != other:
            raise Unstable(f"{body} gave {one} and then {other}")
    return [Request(body, reference) for body, reference in zip(bodies, first, strict=True)]


def _run(client: Client, bodies: Sequence[dict[str, Any]], at_once: int) -> list[Reference]:
    with ThreadPoolExecutor(at_once) as pool:
        return [Reference.of(job) for job in pool.map(lambda body: _to_end(client, body), bodies)]


def _to_end(client: Client, body: dict[str, Any]) -> RemoteJob:
    job = client.submit(body, wait_s=10)
    while not job.status.terminal:
        job = client.job(job.id, wait_s=10)
    return job


def _body(rng: random.Random, orders: str) -> dict[str, Any]:
    long = rng.random() < 0.5
    words = _LONG_PROMPT if rng.random() < 0.15 else rng.randint(3, 25)
    text = orders + " ".join(rng.choices(_WORDS, k=words))
    body: dict[str, Any] = {"seed": 0} if orders else {}  # the fake model takes its words from the seed
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
    """A piece of the text's second half: it may begin and end inside a token, and inside a cut."""
    start = rng.randrange(len(text) // 2, len(text) - 4)
    return [text[start : start + rng.randint(2, 6)]]


def draw(rng: random.Random, requests: Sequence[Request]) -> tuple[Request, Style]:
    """A request and a way to treat it. Most are left to end by themselves."""
    (style,) = rng.choices(tuple(_SHARES), weights=tuple(_SHARES.values()))
    return rng.choice(requests), style
