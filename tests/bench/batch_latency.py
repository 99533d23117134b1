"""What a batch costs interactive clients: their times to the first token without and beside it, in turns.

    python -m tests.bench.batch_latency --model models/SmolLM2-135M-Instruct --rounds 5

Each round measures interactive clients alone, then beside a batch, on the same stack. So a machine that becomes busier
meanwhile disturbs both. `--model fake` measures the stack without a model: its steps take 10 ms.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import openai

from scripts.client.api import Client
from tests.bench.samples import quantile
from tests.plugins.stack import Stack, made_stack

FAKE: Final = Path("fake")
PAUSE: Final = "!pause=0.01"
CLIENTS: Final = 4
UNFINISHED: Final = ("validating", "in_progress", "finalizing")


@dataclass(frozen=True, slots=True)
class Load:
    """What the batch and the interactive clients send.

    Attributes:
        lines: requests of the batch of a round.
        alone_s: how long a round measures the clients alone.
    """

    model: Path
    lines: int
    batch_tokens: int
    tokens: int
    alone_s: float

    @property
    def prefix(self) -> str:
        """The beginning of each prompt."""
        return PAUSE if self.model == FAKE else "Tell a story about"


@dataclass(frozen=True, slots=True)
class Request:
    """An interactive request.

    Attributes:
        first_s: from sending the request to the first token.
        queue_s, prefill_s: the parts of it that the service reports.
    """

    first_s: float
    queue_s: float
    prefill_s: float


@dataclass
class Round:
    """The requests of a round."""

    alone: list[Request] = field(default_factory=list)
    beside: list[Request] = field(default_factory=list)
    batch_s: float = 0.0

    def ratio(self, share: float) -> float:
        """Return a quantile beside the batch, relative to the same quantile without it."""
        return first_token(self.beside, share) / first_token(self.alone, share)


def first_token(requests: Sequence[Request], share: float) -> float:
    """Return a quantile of the times to the first token."""
    return quantile([each.first_s for each in requests], share)


@contextmanager
def batch_stack(model: Path, **variables: str) -> Iterator[Stack]:
    """Start an API, a background process and a worker."""
    backend = {"BACKEND": "fake"} if model == FAKE else {}
    for stack in made_stack(model, {"RETENTION_S": "30", **backend, **variables}):
        stack.start_web()
        stack.start_worker()
        stack.start_background()
        yield stack


def start_batch(stack: Stack, client: openai.OpenAI, lines: int, prefix: str, tokens: int) -> str:
    """Upload a file of requests and start a batch; return its id."""
    content = b"".join(_line(number, prefix, tokens) for number in range(lines))
    file = client.files.create(file=("in.jsonl", content), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
    return batch.id


def _line(number: int, prefix: str, tokens: int) -> bytes:
    message = {"role": "user", "content": f"{prefix} line {number}"}
    body = {"messages": [message], "max_tokens": tokens}
    request = {"custom_id": str(number), "method": "POST", "url": "/v1/chat/completions", "body": body}
    return json.dumps(request).encode() + b"\n"


def interactive(stack: Stack, prefix: str, tokens: int, over: Callable[[], bool]) -> list[Request]:
    """Send interactive requests from a few clients, each one after another, until it is over."""
    requests: list[Request] = []

    def work(number: int) -> None:
        sent = 0
        with Client(stack.url, stack.key) as client:
            while not over():
                sent += 1
                requests.append(_request(client, f"{prefix} client {number}, request {sent}", tokens))

    clients = [threading.Thread(target=work, args=(number,)) for number in range(CLIENTS)]
    for each in clients:
        each.start()
    for each in clients:
        each.join()
    return requests


def _request(client: Client, prompt: str, tokens: int) -> Request:
    body = {"messages": [{"role": "user", "content": prompt}], "max_tokens": tokens, "stream": True}
    started = time.monotonic()
    first, data = 0.0, ""
    with client.stream("POST", "/inference", json=body, headers={"Accept": "text/event-stream"}) as response:
        for line in response.iter_lines():
            if not first and line.startswith("event: chunk"):
                first = time.monotonic() - started
            if line.startswith("data: "):
                data = line.removeprefix("data: ")
    timings = json.loads(data)["timings"]
    return Request(first, timings["queue_s"], timings["prefill_s"])


def measure(load: Load, rounds: int, variables: dict[str, str]) -> list[Round]:
    """Measure some rounds on one stack, after a short one that is not counted."""
    with (
        batch_stack(load.model, **variables) as stack,
        openai.OpenAI(base_url=f"{stack.url}/v1", api_key=stack.key) as client,
    ):
        interactive(stack, load.prefix, load.tokens, _after(2.0))
        return [_round(stack, client, load) for _ in range(rounds)]


def _round(stack: Stack, client: openai.OpenAI, load: Load) -> Round:
    figures = Round(interactive(stack, load.prefix, load.tokens, _after(load.alone_s)))
    started = time.monotonic()
    batch_id = start_batch(stack, client, load.lines, load.prefix, load.batch_tokens)
    ended = threading.Event()
    waiter = threading.Thread(target=_wait, args=(client, batch_id, ended))
    waiter.start()
    figures.beside = interactive(stack, load.prefix, load.tokens, ended.is_set)
    waiter.join()
    figures.batch_s = time.monotonic() - started
    return figures


def _wait(client: openai.OpenAI, batch_id: str, ended: threading.Event) -> None:
    try:
        while client.batches.retrieve(batch_id).status in UNFINISHED:
            time.sleep(0.5)
    finally:
        ended.set()


def _after(seconds: float) -> Callable[[], bool]:
    until = time.monotonic() + seconds
    return lambda: time.monotonic() > until


def summary(rounds: Sequence[Round]) -> dict[str, Any]:
    """Return the figures of all rounds together, and the ratio of each."""
    found: dict[str, Any] = {"rounds": len(rounds), "batch_s": round(statistics.mean(r.batch_s for r in rounds), 1)}
    for name in ("alone", "beside"):
        requests: list[Request] = [each for r in rounds for each in getattr(r, name)]
        found[name] = {"requests": len(requests)} | {
            f"{part}_p{share * 100:.0f}_ms": round(quantile([getattr(each, part) for each in requests], share) * 1e3, 1)
            for part in ("first_s", "queue_s", "prefill_s")
            for share in (0.5, 0.99)
        }
    found["p99_ratio"] = round(found["beside"]["first_s_p99_ms"] / found["alone"]["first_s_p99_ms"], 2)
    found["p99_ratio_of_each_round"] = [round(each.ratio(0.99), 2) for each in rounds]
    found["p50_ratio_of_each_round"] = [round(each.ratio(0.5), 2) for each in rounds]
    return found


def main() -> int:
    """Measure and print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=FAKE)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--lines", type=int, default=1000, help="lines of each round's batch")
    parser.add_argument("--batch-tokens", type=int, default=48)
    parser.add_argument("--tokens", type=int, default=12, help="tokens of an interactive answer")
    parser.add_argument("--alone-s", type=float, default=8.0)
    parser.add_argument("settings", nargs="*", metavar="NAME=VALUE", help="settings of the stack")
    options = parser.parse_args()
    load = Load(options.model, options.lines, options.batch_tokens, options.tokens, options.alone_s)
    rounds = measure(load, options.rounds, dict(each.split("=", 1) for each in options.settings))
    print(json.dumps(summary(rounds), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
