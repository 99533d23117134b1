"""Vectors per second: `python -m tests.bench.embeddings`.

First of a worker's runner, by the size of its passes. The models have random weights and the shapes of all-MiniLM-L6-v2
(small) and bge-base. The inputs have 8 to 128 tokens. The passes of all sizes take turns, so that a busy machine slows
all of them. The processor time is the more reliable one.

Then of the whole stack, by the number of inputs in a request. The model is tiny, so this is the cost of serving.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from rich import print as show
from rich.table import Table

from shared.blas import prefer_openblas

prefer_openblas()

import mlx.core as mx  # noqa: E402 - after its BLAS library

from scripts.client.api import Client  # noqa: E402
from shared.jobs.inputs import Input  # noqa: E402
from shared.jobs.request import EMBED, Request, Sampling  # noqa: E402
from shared.models.registry import ModelCard  # noqa: E402
from tests.plugins.stack import catalog_stack  # noqa: E402
from tests.support.embedding_models import TEXTS, make_embedding_model  # noqa: E402
from tests.support.waiting import eventually  # noqa: E402
from worker.runner.base import PrefillWork, Row, RowInputs, StepPlan  # noqa: E402
from worker.runner.embedding.bert import BertEncoder  # noqa: E402
from worker.runner.embedding.model import EmbeddingModel  # noqa: E402
from worker.runner.embedding.pooling import Pooling  # noqa: E402
from worker.runner.embedding.runner import EmbeddingRunner  # noqa: E402

_SHAPES: Final[dict[str, dict[str, int]]] = {
    "small": {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536},
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "intermediate_size": 3072},
}
_VOCABULARY: Final = 30_522
_PASSES: Final = (1, 128, 512, 2048)
"""Tokens of a pass; 1: each input has a pass of its own."""
_CLIENTS: Final = 8
_REQUESTS: Final = (1, 16, 128)
_REQUEST: Final = Request("m", 0, Sampling(0.0), kind=EMBED)


def _model(shape: dict[str, int]) -> EmbeddingModel:
    config: dict[str, Any] = {
        **shape,
        "model_type": "bert",
        "vocab_size": _VOCABULARY,
        "max_position_embeddings": 512,
        "num_attention_heads": 12,
    }
    encoder = BertEncoder(config)
    mx.eval(encoder.module.parameters())
    return EmbeddingModel(encoder, encoder.module, config, Pooling("mean"), shape["intermediate_size"])


def _inputs(count: int) -> tuple[Input, ...]:
    rng = random.Random(0)
    lengths = [rng.randint(8, 128) for _ in range(count)]
    return tuple(Input(tuple(rng.randrange(1000, _VOCABULARY) for _ in range(length))) for length in lengths)


def _run(model: EmbeddingModel, inputs: Sequence[Input], tokens: int) -> tuple[float, float]:
    """Compute all inputs; return the seconds by the clock and of the processor."""
    runner = EmbeddingRunner(model, ModelCard("m", EMBED, 512), 2**40)
    runner.chunk = tokens
    work = RowInputs(tuple(inputs), set(range(len(inputs))))
    runner.insert([Row(1, _REQUEST, inputs[0].tokens, 0, 0, inputs=work)])
    wall, processor = time.perf_counter(), time.process_time()
    while runner.prefillable():
        runner.execute(StepPlan(PrefillWork((1,))))
    return time.perf_counter() - wall, time.process_time() - processor


def _serve(count: int, rounds: int) -> Table:
    """Measure the whole stack with `count` texts, in requests of several sizes, which take turns."""
    table = Table("inputs of a request", "vectors/s", title=f"{_CLIENTS} clients, tiny model")
    times: dict[int, list[float]] = {size: [] for size in _REQUESTS}
    with tempfile.TemporaryDirectory() as folder:
        model = make_embedding_model(Path(folder) / "bert", "bert", pooling="mean_tokens")
        catalog = f'default = "bert"\n[models.bert]\npath = "{model}"\n'
        with catalog_stack(catalog, WORKER_MODELS="bert") as stack, stack.client() as client:
            stack.start_worker()
            eventually(lambda: stack.registry.models()["bert"].tokenizer, "the tokenizer is announced", 120)
            for _ in range(rounds):
                for size, measured in times.items():
                    measured.append(_request(client, [TEXTS[n % len(TEXTS)] for n in range(count)], size))
    for size, measured in times.items():
        table.add_row(str(size), f"{count / statistics.median(measured):.0f}")
    return table


def _request(client: Client, texts: Sequence[str], size: int) -> float:
    """Send all texts, `size` in a request; return the seconds."""
    bodies = [
        {"model": "bert", "input": [*texts[start : start + size]], "encoding_format": "base64"}
        for start in range(0, len(texts), size)
    ]
    began = time.perf_counter()
    with ThreadPoolExecutor(_CLIENTS) as pool:
        list(pool.map(lambda body: client.request("POST", "/v1/embeddings", json=body), bodies))
    return time.perf_counter() - began


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=64)
    parser.add_argument("--served", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shape", choices=[*_SHAPES], action="append", help="default: all")
    options = parser.parse_args()
    inputs = _inputs(options.inputs)
    table = Table("model", "tokens of a pass", "vectors/s", "vectors per second of the processor")
    for name in options.shape or _SHAPES:
        model = _model(_SHAPES[name])
        times: dict[int, list[tuple[float, float]]] = {tokens: [] for tokens in _PASSES}
        for _ in range(options.rounds):
            for tokens, measured in times.items():
                measured.append(_run(model, inputs, tokens))
        for tokens, measured in times.items():
            wall, processor = (statistics.median(each) for each in zip(*measured, strict=True))
            label = "one input" if tokens == 1 else str(tokens)
            table.add_row(name, label, f"{len(inputs) / wall:.0f}", f"{len(inputs) / processor:.0f}")
    show(table)
    show(_serve(options.served, options.rounds))


if __name__ == "__main__":
    main()
