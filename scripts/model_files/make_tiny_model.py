"""scripts/make_tiny_model: a model of random weights, so small that only the cost of serving it shows; or a large one.

It speaks nonsense in SmolLM2's tokens. The benchmarks and the tests of scheduling use the tiny one; `--shape` gives one
that is as large as a real one, for measuring where its weights cannot be had. The same call makes the same weights
every time.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from scripts.model_files.manifest import Origin, check_replaceable, is_intact, read_origin, write_manifest
from scripts.model_files.random_weights import SEED, SHARD_BYTES, size, write_random_weights
from scripts.model_files.shapes import SHAPES, TINY, Shape
from scripts.model_files.space import check_space
from scripts.model_files.staging import locked, staged
from scripts.model_files.vocabulary import padded, with_special
from shared.models.folder import ModelError, check_folder
from shared.settings import ROOT

_MODELS = ROOT / "models"
_SOURCE = "random weights"
_TOKENIZER = "tokenizer.json"
_COPIED = ("tokenizer_config.json", "generation_config.json")


def make_tiny_model(target: Path, tokenizer_from: Path, shape: Shape = TINY, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Write a model of this shape into `target`, with the tokenizer of the model folder `tokenizer_from`.

    Raises:
        ModelError: `tokenizer_from` is not a complete model folder, or `target` is something else, or the disk is full.
    """
    check_folder(tokenizer_from)
    config = shape.config_with(json.loads((tokenizer_from / "config.json").read_text("utf-8")))
    requested = "" if shape is TINY else shape.name
    origin = Origin(_SOURCE, str(SEED), requested, dtype=config["torch_dtype"])
    with locked(target.parent):
        if read_origin(target) == origin and is_intact(target):
            return
        check_replaceable(target, _SOURCE)
        check_space(target.parent, size(config))
        with staged(target) as folder:
            (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
            _write_tokenizer(folder, tokenizer_from, config, shape)
            write_random_weights(folder, config, shard_bytes)
            check_folder(folder)
            write_manifest(folder, origin)


def _write_tokenizer(folder: Path, tokenizer_from: Path, config: dict[str, Any], shape: Shape) -> None:
    for name in _COPIED:
        if (tokenizer_from / name).is_file():
            shutil.copyfile(tokenizer_from / name, folder / name)
    text = (tokenizer_from / _TOKENIZER).read_text("utf-8")
    filled = padded(with_special(json.loads(text), shape.special), config["vocab_size"])
    # As it is where nothing was missing: another's way of writing JSON is no change.
    (folder / _TOKENIZER).write_text(text if filled == json.loads(text) else json.dumps(filled), "utf-8")
    for name, content in shape.files.items():
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content, indent=2), "utf-8")


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="scripts/make_tiny_model", description="Make a model of random weights for benchmarks and tests."
    )
    parser.add_argument("--shape", choices=list(SHAPES), default=TINY.name, help="default: a tiny llama")
    parser.add_argument("-o", "--output", type=Path, help="folder to make (default: under models/, named by the shape)")
    parser.add_argument(
        "--tokenizer-from",
        type=Path,
        default=_MODELS / "SmolLM2-135M-Instruct",
        help="model folder that gives the tokenizer (default: %(default)s; scripts/fetch_model makes it)",
    )
    arguments = parser.parse_args()
    shape = SHAPES[arguments.shape]
    output = arguments.output or _MODELS / shape.folder
    try:
        make_tiny_model(output, arguments.tokenizer_from, shape)
    except (ModelError, OSError) as error:
        print(f"make_tiny_model: {error}", file=sys.stderr)
        return 1
    print(f"{output} is ready")
    return 0


if __name__ == "__main__":
    sys.exit(main())
