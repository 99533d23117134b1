"""The CPU time of a burst of requests with an image each, in process: this engine, or mlx_vlm.server's generator.

`python -m tests.bench.image_burst MODEL_FOLDER mlxq|mlx_vlm` answers three bursts of new images, then the last images
again. Servers, clients and other processes on the machine are not in the figures. This engine's clocks are replaced by
the CPU time too, because its plans depend on measured durations.
"""

from __future__ import annotations

import atexit
import hashlib
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shared.blas import prefer_openblas
from tests.bench.scenarios.images import ANSWER_TOKENS, HEIGHT, WIDTH, png

IMAGES, BURSTS = 16, 3
QUESTIONS = ("What do you see?", "And what is in the corner?")

Burst = Callable[[list[int], str], list[float]]
"""Answers a question about each of these images; returns the moments of the first tokens."""


def own(folder: Path) -> Burst:
    """This engine."""
    time.perf_counter = time.monotonic = time.process_time
    from shared.jobs.request import Request
    from tests.bench.in_process import GREEDY, InProcess
    from worker.runner import cpu_attention
    from worker.runner.memory import Memory
    from worker.runner.model_runner import MLXRunner, default_chunk
    from worker.runner.vision.load import load_vision_model

    cpu_attention.install()
    loaded, half = load_vision_model(folder)
    runner = MLXRunner(loaded, default_chunk(), Memory(4 * 2**30, 2**30), vision=half)
    runner.warm()
    engine = InProcess(runner)

    def request(number: int, question: str) -> tuple[list[int], Request, dict[str, bytes]]:
        data = png(WIDTH, HEIGHT, number)
        digest = hashlib.sha256(data).hexdigest()
        text = {"type": "text", "text": f"Picture {number:06}: {question}"}
        image = {"type": "image", "image": digest, "width": WIDTH, "height": HEIGHT}
        shown = [{"role": "user", "content": [{"type": "image"}, text]}]
        ids = loaded.tokenizer.apply_chat_template(shown, add_generation_prompt=True, tokenize=True)
        messages = ({"role": "user", "content": [image, text]},)
        return ids, Request(runner.card.id, ANSWER_TOKENS, GREEDY, messages=messages), {digest: data}

    def burst(numbers: list[int], question: str) -> list[float]:
        waiting = [engine.submit_request(*request(number, question)) for number in numbers]
        first: dict[int, float] = {}
        while engine.core.busy or not first:
            for output in engine.step():
                if output.sequence.generated:
                    first.setdefault(output.sequence.uid, time.process_time())
        assert all(len(row.generated) == ANSWER_TOKENS for row in waiting)
        return [*first.values()]

    return burst


def peer(folder: Path) -> Burst:
    """mlx_vlm.server's generator, with one thread per request."""
    from mlx_vlm.prompt_utils import apply_chat_template
    from mlx_vlm.server.generation import GenerationArguments, ResponseGenerator
    from mlx_vlm.vision_cache import VisionFeatureCache

    generator = ResponseGenerator(str(folder), vision_cache=VisionFeatureCache())
    _, processor, config = generator.wait_until_ready()
    atexit.register(generator.stop_and_join)
    files = tempfile.TemporaryDirectory(prefix="mlxq-bench-")

    def path(number: int) -> Path:
        return Path(files.name) / f"{number}.png"

    def answer(number: int, question: str, first: list[float]) -> None:
        messages = [{"role": "user", "content": f"Picture {number:06}: {question}"}]
        prompt: Any = apply_chat_template(processor, config, messages, num_images=1)
        arguments = GenerationArguments(max_tokens=ANSWER_TOKENS, temperature=0.0)
        _, tokens = generator.generate(prompt, [str(path(number))], args=arguments)
        next(tokens)
        first.append(time.process_time())
        assert 1 + sum(token.token_count for token in tokens) == ANSWER_TOKENS

    def burst(numbers: list[int], question: str) -> list[float]:
        for number in numbers:
            path(number).write_bytes(png(WIDTH, HEIGHT, number))
        first: list[float] = []
        threads = [threading.Thread(target=answer, args=(number, question, first)) for number in numbers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return first

    return burst


def main() -> None:
    """Print a line per burst."""
    prefer_openblas()
    burst = {"mlxq": own, "mlx_vlm": peer}[sys.argv[2]](Path(sys.argv[1]).resolve())
    for number in range(BURSTS + 1):
        again = number == BURSTS
        images = [IMAGES * (number - again) + index for index in range(IMAGES)]
        started = time.process_time()
        first = sorted(moment - started for moment in burst(images, QUESTIONS[again]))
        seconds = time.process_time() - started
        print(
            f"{sys.argv[2]}{', the same images again' if again else ''}: {IMAGES * ANSWER_TOKENS / seconds:.0f} tokens "
            f"per CPU second, first tokens after {first[IMAGES // 2]:.2f} (median) and {first[-1]:.2f} s (last)"
        )


if __name__ == "__main__":
    main()
