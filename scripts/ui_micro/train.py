"""`scripts/train_ui_micro`: trains a vision model small enough for the repository: ui-micro, ui-micro-gemma3.

It looks at synthetic screenshots and answers an instruction such as "click the red Save button" with
`click(start_box='(x,y)')`, as UI-TARS does. There is one such model per architecture.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from shared.blas import prefer_openblas

os.environ["OPENBLAS_NUM_THREADS"] = (
    "1"  # more threads add numbers in another order, so the same seed would give another model
)
prefer_openblas()  # before anything imports MLX

import mlx.core as mx  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn  # noqa: E402

from scripts.lib.progress import LABEL, ProgressBar  # noqa: E402
from scripts.model_files.staging import staged  # noqa: E402
from scripts.model_files.weights import save_weights  # noqa: E402
from scripts.ui_micro.architectures.architecture import Architecture, Json  # noqa: E402
from scripts.ui_micro.architectures.gemma import GEMMA  # noqa: E402
from scripts.ui_micro.architectures.qwen import QWEN  # noqa: E402
from scripts.ui_micro.evaluation import evaluate, held_out, load_predictor  # noqa: E402
from scripts.ui_micro.tokenizer import make_tokenizer  # noqa: E402
from scripts.ui_micro.training import STEPS, train  # noqa: E402
from shared.settings import ROOT  # noqa: E402

SEED: Final = 7
TRIALS: Final = 400
ARCHITECTURES: Final[Mapping[str, Architecture]] = {each.name: each for each in (QWEN, GEMMA)}
CHECKPOINT_STEPS: Final = 500
GOAL: Final = 0.9
_COLUMNS: Final = (
    LABEL, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[losses]}")
)  # fmt: skip


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="scripts/train_ui_micro",
        description=(__doc__ or "").partition(": ")[2],
        epilog="Training takes about an hour on one core with OpenBLAS.",
    )
    parser.add_argument("--shape", choices=ARCHITECTURES, default=QWEN.name, help="architecture (default: %(default)s)")
    parser.add_argument("-o", "--output", type=Path, help="default: models/ui-micro, or models/ui-micro-gemma3")
    parser.add_argument("--steps", type=int, default=STEPS, help="number of training steps (default: %(default)s)")
    parser.add_argument("--evaluate-only", action="store_true", help="evaluate the existing model")
    parser.add_argument(
        "--trials", type=int, default=TRIALS, help="number of screenshots for the evaluation (default: %(default)s)"
    )
    return parser.parse_args(argv)


def make(architecture: Architecture, output: Path, steps: int) -> None:
    """Train and write the folder, also every CHECKPOINT_STEPS."""
    tokenizer = make_tokenizer(architecture)
    config = architecture.config(tokenizer)
    mx.random.seed(SEED)
    model = architecture.make_model(config)

    def show(step: int, losses: str) -> None:
        bar.update(step, losses=losses)
        if step % CHECKPOINT_STEPS == 0 or step == steps:
            with staged(output) as folder:
                save_weights(folder / "model.safetensors", dict(tree_flatten(model.parameters())))
                tokenizer.save(str(folder / "tokenizer.json"))
                write_files(folder, architecture, config)

    with ProgressBar("Training", steps, _COLUMNS, losses="") as bar:
        train(architecture, model, tokenizer, steps, show)


def write_files(folder: Path, architecture: Architecture, config: Json) -> None:
    """Write the configuration files."""
    kept = ("bos_token_id", "eos_token_id", "pad_token_id")
    generation = {"do_sample": False, "max_new_tokens": 32} | {name: config[name] for name in kept}
    files = {**architecture.files(), "config.json": config, "generation_config.json": generation}
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Train and evaluate; return the exit status: 1 if too few clicks hit."""
    options = arguments(argv)
    architecture = ARCHITECTURES[options.shape]
    output = options.output or ROOT / "models" / architecture.folder
    if not options.evaluate_only:
        make(architecture, output, options.steps)
        print(f"{output} is ready")
    scores = evaluate(load_predictor(output), architecture.answers, held_out(options.trials))
    for group, score in scores.items():
        print(f"{group:16} {score}")
    return 0 if scores["all"].share >= GOAL else 1


if __name__ == "__main__":
    sys.exit(main())
