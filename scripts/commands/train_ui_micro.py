"""`scripts/train_ui_micro`: trains models/ui-micro, a vision model small enough to come with the repository.

It looks at synthetic screenshots and answers an instruction such as "click the red Save button" with
`click(start_box='(x,y)')`, as UI-TARS does.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from shared.blas import prefer_openblas

prefer_openblas()  # before anything imports MLX

import mlx.core as mx  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402

from scripts.model_files.staging import staged  # noqa: E402
from scripts.ui_micro.evaluation import asker, evaluate, held_out  # noqa: E402
from scripts.ui_micro.folder import write_folder  # noqa: E402
from scripts.ui_micro.shape import config, make_model  # noqa: E402
from scripts.ui_micro.tokenizer import make_tokenizer  # noqa: E402
from scripts.ui_micro.training import Pass, train  # noqa: E402
from shared.settings import ROOT  # noqa: E402

SEED: Final = 7
COURSE: Final = (
    Pass(steps=7000, first=0, per_scene=6, twins=True, kept=0.0, pointed=0.0),
    Pass(steps=2500, first=100_000, per_scene=8, twins=False, kept=0.5, pointed=2.0),
)
TRIALS: Final = 400
GOAL: Final = 0.9


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="scripts/train_ui_micro",
        description=(__doc__ or "").partition(": ")[2],
        epilog="All of it takes about an hour on two cores with OpenBLAS.",
    )
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "models/ui-micro", help="default: %(default)s")
    parser.add_argument("--steps", type=int, nargs="+", help="of each pass, instead of all; to see that it runs")
    parser.add_argument("--evaluate-only", action="store_true", help="ask the model that is there")
    parser.add_argument("--trials", type=int, default=TRIALS, help="held-out screenshots (default: %(default)s)")
    return parser.parse_args(argv)


def make(output: Path, steps: Sequence[int] | None) -> None:
    """Train and write the folder."""
    tokenizer = make_tokenizer()
    settings = config(tokenizer)
    course = [replace(each, steps=n) for each, n in zip(COURSE, steps or [each.steps for each in COURSE], strict=False)]
    with tempfile.TemporaryDirectory() as between:
        reached = Path(between) / "weights.safetensors"
        for number, each in enumerate(course, 1):
            mx.random.seed(SEED)  # as if each pass were a run of its own
            model = make_model(settings)
            if reached.exists():
                model.load_weights(str(reached))
            print(f"pass {number} of {len(course)}: {each.steps} steps", flush=True)
            train(model, tokenizer, each, lambda line: print(line, flush=True))
            mx.save_safetensors(str(reached), dict(tree_flatten(model.parameters())))
        with staged(output) as folder:
            write_folder(folder, settings, tokenizer, mx.load(str(reached)))  # type: ignore[arg-type]


def main(argv: Sequence[str] | None = None) -> int:
    """Train, then ask about screenshots it has not seen; 1 when too few of its clicks hit."""
    asked = arguments(argv)
    if not asked.evaluate_only:
        make(asked.output, asked.steps)
        print(f"{asked.output} is ready")
    scores = evaluate(asker(asked.output), held_out(asked.trials))
    for group, score in scores.items():
        print(f"{group:16} {score}")
    return 0 if scores["all"].share >= GOAL else 1


if __name__ == "__main__":
    sys.exit(main())
