"""`scripts/train_ui_micro`: trains models/ui-micro, a vision model small enough for the repository.

It looks at synthetic screenshots and answers an instruction such as "click the red Save button" with
`click(start_box='(x,y)')`, as UI-TARS does.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
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
from scripts.ui_micro.evaluation import evaluate, held_out, load_predictor  # noqa: E402
from scripts.ui_micro.folder import write_folder  # noqa: E402
from scripts.ui_micro.shape import config, make_model  # noqa: E402
from scripts.ui_micro.tokenizer import make_tokenizer  # noqa: E402
from scripts.ui_micro.training import STEPS, train  # noqa: E402
from shared.settings import ROOT  # noqa: E402

SEED: Final = 7
TRIALS: Final = 400
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
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "models/ui-micro", help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=STEPS, help="number of training steps (default: %(default)s)")
    parser.add_argument("--evaluate-only", action="store_true", help="evaluate the existing model")
    parser.add_argument(
        "--trials", type=int, default=TRIALS, help="number of screenshots for the evaluation (default: %(default)s)"
    )
    return parser.parse_args(argv)


def make(output: Path, steps: int) -> None:
    """Train and write the folder."""
    tokenizer = make_tokenizer()
    settings = config(tokenizer)
    mx.random.seed(SEED)
    model = make_model(settings)
    with ProgressBar("Training", steps, _COLUMNS, losses="") as bar:
        train(model, tokenizer, steps, lambda step, losses: bar.update(step, losses=losses))
    with staged(output) as folder:
        write_folder(folder, settings, tokenizer, dict(tree_flatten(model.parameters())))


def main(argv: Sequence[str] | None = None) -> int:
    """Train and evaluate; return the exit status: 1 if too few clicks hit."""
    options = arguments(argv)
    if not options.evaluate_only:
        make(options.output, options.steps)
        print(f"{options.output} is ready")
    scores = evaluate(load_predictor(options.output), held_out(options.trials))
    for group, score in scores.items():
        print(f"{group:16} {score}")
    return 0 if scores["all"].share >= GOAL else 1


if __name__ == "__main__":
    sys.exit(main())
