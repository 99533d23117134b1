"""scripts/make_tiny_model: a model with random weights, either tiny or as large as a real one.

With the tiny model, measurements show the cost of serving. Large ones replace real models whose weights are not
available. The weights are the same each time.
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
from scripts.model_files.vocabulary import add_special_tokens, pad_vocabulary
from shared.models.folder import ModelError, check_folder
from shared.settings import ROOT

_MODELS = ROOT / "models"
_SOURCE = "random weights"
_TOKENIZER = "tokenizer.json"
_TOKENIZER_CONFIG = "tokenizer_config.json"
_COPIED = (_TOKENIZER_CONFIG, "generation_config.json")


def make_tiny_model(target: Path, tokenizer_from: Path, shape: Shape = TINY, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Write a model of a shape into `target`, with the tokenizer of the model folder `tokenizer_from`.

    Raises:
        ModelError: `tokenizer_from` is incomplete, `target` contains another model, or the disk is full.
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
    filled = pad_vocabulary(add_special_tokens(json.loads(text), shape.special), config["vocab_size"])
    # Keep the original file if nothing was added, rather than reformat its JSON.
    (folder / _TOKENIZER).write_text(text if filled == json.loads(text) else json.dumps(filled), "utf-8")
    if shape.tokenizer:
        settings = json.loads((folder / _TOKENIZER_CONFIG).read_text("utf-8")) | dict(shape.tokenizer)
        (folder / _TOKENIZER_CONFIG).write_text(json.dumps(settings, indent=2), "utf-8")
    for name, content in shape.files.items():
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content, indent=2), "utf-8")


def main() -> int:
    """Run the command; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="scripts/make_tiny_model", description="Create a model with random weights for benchmarks and tests."
    )
    parser.add_argument("--shape", choices=list(SHAPES), default=TINY.name, help="default: a tiny llama")
    parser.add_argument(
        "-o", "--output", type=Path, help="folder to create (default: below models/, named after the shape)"
    )
    parser.add_argument(
        "--tokenizer-from",
        type=Path,
        default=_MODELS / "SmolLM2-135M-Instruct",
        help="model folder with the tokenizer (default: %(default)s; scripts/fetch_model creates it)",
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
