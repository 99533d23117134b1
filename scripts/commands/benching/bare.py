"""mlx-lm's BatchGenerator alone: reads `{"clients", "max_tokens"}` lines, writes a burst's figures for each."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from scripts.commands.benching.load import Burst, Sample, prompt
from shared.blas import prefer_openblas


def run(model: Any, tokenizer: Any, slots: int, clients: int, max_tokens: int, offset: int) -> Burst:
    """All prompts at once through one BatchGenerator."""
    from mlx_lm.generate import BatchGenerator

    start = time.perf_counter()
    prompts = [tokenizer.apply_chat_template(prompt(offset + i), add_generation_prompt=True) for i in range(clients)]
    generator: Any = BatchGenerator(
        model, stop_tokens=[[token] for token in tokenizer.eos_token_ids], completion_batch_size=slots
    )
    moments: dict[int, list[float]] = {uid: [] for uid in generator.insert(prompts, [max_tokens] * clients)}
    while any_left := generator.next_generated():
        for response in any_left:
            moments[response.uid].append(time.perf_counter() - start)
    wall = time.perf_counter() - start
    generator.close()
    return Burst.of([Sample(m[0], tuple(m), len(m)) for m in moments.values()], wall)


def main() -> None:
    """Load the model named by the first argument, answer until standard input ends."""
    prefer_openblas()
    from mlx_lm import load

    folder, slots = Path(sys.argv[1]), int(sys.argv[2])
    model, tokenizer = load(str(folder))[:2]
    sent = 0
    for line in sys.stdin:
        asked = json.loads(line)
        result = run(model, tokenizer, slots, asked["clients"], asked["max_tokens"], sent)
        sent += asked["clients"]
        print(json.dumps(asdict(result)), flush=True)


if __name__ == "__main__":
    main()
