"""mlx-lm's BatchGenerator alone, in process: reads plans as JSON lines and writes the outcome of each.

python -m tests.bench.bare MODEL_FOLDER ROWS
"""

from __future__ import annotations

import json
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shared.blas import prefer_openblas
from tests.bench.plans import ChatRequest, Plan
from tests.bench.samples import Outcome, Sample


@dataclass(slots=True)
class _Client:
    index: int
    background: bool
    requests: deque[ChatRequest]
    busy: bool = False


class Run:
    """Runs one plan with one generator; requests are inserted between two steps."""

    def __init__(self, model: Any, tokenizer: Any, slots: int, plan: Plan) -> None:
        from mlx_lm.generate import BatchGenerator

        self._tokenizer = tokenizer
        self._generator: Any = BatchGenerator(
            model, stop_tokens=[[token] for token in tokenizer.eos_token_ids], completion_batch_size=slots
        )
        self._clients = [_Client(i, each.background, deque(each.requests)) for i, each in enumerate(plan.clients)]
        self._rows: dict[int, tuple[_Client, Sample]] = {}
        self._samples: list[Sample] = []
        self._start = time.perf_counter()

    def run(self) -> Outcome:
        """Run until only background clients are left."""
        while any((client.busy or client.requests) and not client.background for client in self._clients):
            self._admit()
            if self._rows:
                self._step()
            else:
                self._sleep()
        wall_s = self._now()
        self._generator.close()
        return Outcome(self._samples, wall_s)

    def _now(self) -> float:
        return time.perf_counter() - self._start

    def _sleep(self) -> None:
        """Sleep until the next request is due."""
        due_s = min(client.requests[0].at_s for client in self._clients if client.requests)
        time.sleep(max(0.0, due_s - self._now()))

    def _admit(self) -> None:
        for client in self._clients:
            if client.requests and not client.busy and client.requests[0].at_s <= self._now():
                self._insert(client, client.requests.popleft())

    def _insert(self, client: _Client, request: ChatRequest) -> None:
        sample = Sample(client.index, request.kind, request.at_s or self._now())
        prompt = self._tokenizer.apply_chat_template(request.messages, add_generation_prompt=True)
        (uid,) = self._generator.insert([prompt], [request.max_tokens])
        self._rows[uid] = client, sample
        self._samples.append(sample)
        client.busy = True

    def _step(self) -> None:
        for response in self._generator.next()[1]:
            client, sample = self._rows[response.uid]
            sample.chunks.append(self._now())
            sample.tokens += 1
            if response.finish_reason is not None:
                sample.ended_s = sample.chunks[-1]
                client.busy = False
                del self._rows[response.uid]


def main() -> None:
    """Load the model and run plans until standard input ends."""
    prefer_openblas()
    from mlx_lm import load

    folder, slots = Path(sys.argv[1]), int(sys.argv[2])
    model, tokenizer = load(str(folder))[:2]
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        outcome = Run(model, tokenizer, slots, Plan.from_json(json.loads(line))).run()
        print(json.dumps(asdict(outcome)), flush=True)


if __name__ == "__main__":
    main()
